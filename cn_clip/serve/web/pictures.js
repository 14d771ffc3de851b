// Pictures that the reader gives: made small enough to send, and kept while the page is open.

// A model looks at a few hundred pixels; what is larger only takes longer to send.
const LONGEST = 1024;
const KEPT_BYTES = 512 * 1024;
const STORE = "cn-clip.picture.";
const held = new Map();

/** Keeps the picture; its name in the address of the page. Throws nothing for a format that only the server knows. */
export async function keep(file) {
  const dataUrl = await toSend(file);
  const name = Date.now().toString(36);
  held.set(name, dataUrl);
  try {
    sessionStorage.setItem(STORE + name, dataUrl);
  } catch {
    // No room: after the page is opened anew, the picture is gone.
  }
  return name;
}

/** The picture as a data URL; undefined when it is gone. */
export const kept = (name) => held.get(name) ?? sessionStorage.getItem(STORE + name) ?? undefined;

/** The first picture among what was dropped or pasted. */
export function fileIn(transfer) {
  const files = [...(transfer?.files ?? [])];
  return files.find((one) => one.type.startsWith("image/")) ?? files[0];
}

async function toSend(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    return read(file); // HEIC, RAW: the server may know it
  }
  const scale = LONGEST / Math.max(bitmap.width, bitmap.height);
  // As it is, a small one has the same vector as from a program.
  if (file.size <= KEPT_BYTES && scale > 0.5) return read(file);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * Math.min(scale, 1)));
  canvas.height = Math.max(1, Math.round(bitmap.height * Math.min(scale, 1)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  // PNG where there is transparency to keep; else a tenth of the bytes.
  return file.type === "image/png" ? canvas.toDataURL("image/png") : canvas.toDataURL("image/jpeg", 0.92);
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
