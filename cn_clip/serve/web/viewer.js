// One picture, as large as the window lets it be, or a video at its second, with what is known of it.
import { icon, make } from "./dom.js";
import { clock, nameOf, ratioOf } from "./grid.js";
import { named } from "./server.js";
import { currentLanguage, number, text } from "./words.js";

// What browsers show; of other files the server makes a JPEG.
const SHOWN = /\.(jpe?g|png|gif|webp|bmp|avif)$/i;
const KNOWN = ["caption", "date", "camera", "width", "height", "folder", "file", "latitude", "longitude", "text", "time", "live", "kind", "video"];
const SWIPE = 60;

/**
 * The viewer in its dialog. on: close(), step(-1 | 1), like(item), unlike(item), labels(item) are called as the reader
 * asks; step is also what arrows and swipes do.
 */
export function viewer(dialog, on) {
  let begin = null;
  dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    on.close();
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("video, input") || event.altKey || event.ctrlKey || event.metaKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) {
      event.preventDefault();
      on.step(step);
    }
  });
  dialog.addEventListener("touchstart", ({ touches }) => {
    begin = touches.length === 1 ? touches[0] : null;
  }, { passive: true });
  dialog.addEventListener("touchend", ({ changedTouches: [end], target }) => {
    if (begin === null || target.closest("video, .facts")) return;
    const [across, down] = [end.clientX - begin.clientX, end.clientY - begin.clientY];
    if (Math.abs(across) > SWIPE && Math.abs(across) > 2 * Math.abs(down)) on.step(across > 0 ? -1 : 1);
  });

  function show(item, { position, hasPrevious, hasNext }) {
    const focused = dialog.open ? document.activeElement?.dataset?.key : null;
    dialog.replaceChildren(...parts(item, { position, hasPrevious, hasNext }));
    if (!dialog.open) dialog.showModal();
    const again = focused && dialog.querySelector(`[data-key="${focused}"]:not(:disabled)`);
    (again || dialog.querySelector('[data-key="close"]')).focus({ preventScroll: true });
  }

  function parts(item, { position, hasPrevious, hasNext }) {
    const button = (key, iconName, action, properties = {}) => {
      const one = make("button", { type: "button", className: "plain", ariaLabel: text(`viewer.${key}`), title: text(`viewer.${key}`), onclick: action, ...properties }, icon(iconName));
      one.dataset.key = key;
      return one;
    };
    const name = nameOf(item);
    return [
      make("div", { className: "stage" },
        media(item, name),
        button("previous", "previous", () => on.step(-1), { disabled: !hasPrevious }),
        button("next", "next", () => on.step(1), { disabled: !hasNext }),
        button("close", "close", on.close)),
      make("div", { className: "facts" },
        make("h2", { textContent: name }),
        make("p", { className: "announced", role: "status", textContent: position === null ? "" : text("viewer.position", { position: number(position + 1), name }) }),
        make("p", { className: "actions" }, ...actions(item, on)),
        path(item),
        facts(item),
        item.original ? null : make("p", { className: "note", textContent: text("viewer.small") })),
    ];
  }

  return { show, close: () => dialog.open && dialog.close() };
}

function actions(item, on) {
  const one = (key, action) => {
    const button = make("button", { type: "button", className: "chip", textContent: text(`viewer.${key}`), onclick: () => action(item) });
    button.dataset.key = key;
    return button;
  };
  const original = item.original && make("a", { className: "chip", href: named(item.original), target: "_blank", textContent: text("viewer.original") });
  return [one("like", on.like), one("unlike", on.unlike), one("labels", on.labels), original];
}

/** The original, with the small picture in its place until it is there; else the small picture. */
function media(item, name) {
  const small = named(item.thumbnail, { size: "large" });
  const original = named(item.original);
  if (original && item.metadata.kind === "video") return video(item, name, original, small);
  const picture = make("img", { alt: name });
  const ratio = ratioOf(item);
  if (ratio) {
    picture.width = item.metadata.width;
    picture.height = item.metadata.height;
  }
  if (small) picture.src = small;
  if (!original) return picture;
  const file = String(item.id);
  const wanted = [...(SHOWN.test(file) ? [original] : []), named(item.original, { as: "jpeg" })];
  const load = () => {
    if (!wanted.length) return;
    const full = new Image();
    full.src = wanted.shift();
    full.decode().then(() => {
      picture.src = full.src;
      picture.classList.add("full");
    }, load);
  };
  load();
  return picture;
}

function video(item, name, original, small) {
  const film = make("video", { controls: true, preload: "metadata", playsInline: true, ariaLabel: name, src: `${original}#t=${Number(item.metadata.time) || 0}` });
  if (small) film.poster = small;
  film.onerror = () => film.replaceWith(
    make("figure", {}, small ? make("img", { src: small, alt: name }) : null, make("figcaption", { className: "note", textContent: text("viewer.unplayable") })));
  return film;
}

function path(item) {
  const field = make("input", { readOnly: true, value: String(item.id), ariaLabel: text("fact.path") });
  const button = make("button", { type: "button", className: "plain small", ariaLabel: text("copy"), title: text("copy") }, icon("copy"));
  const said = make("span", { className: "said", role: "status" });
  button.dataset.key = "copy";
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(field.value);
    } catch {
      // Not over plain HTTP from another machine; the older way works there.
      field.select();
      document.execCommand("copy");
    }
    said.textContent = text("copied");
  };
  return make("p", { className: "path" }, field, button, said);
}

function facts(item) {
  const known = item.metadata;
  const rows = [
    ["caption", known.caption],
    ["date", known.date && moment(String(known.date))],
    ["camera", known.camera],
    ["size", ratioOf(item) && `${known.width} × ${known.height}`],
    ["folder", known.folder],
    ["place", known.latitude !== undefined && known.longitude !== undefined ? `${known.latitude}, ${known.longitude}` : null],
    ["text", known.text],
    ["time", known.kind === "video" ? clock(known.time) : null],
    ["live", known.live],
    ["score", item.score === null ? null : item.score.toFixed(3)],
  ].map(([name, value]) => [text(`fact.${name}`), value]);
  rows.push(...Object.entries(known).filter(([name]) => !KNOWN.includes(name)));
  const shown = rows.filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== false);
  return make("dl", {}, ...shown.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: String(value) })]));
}

/** The camera's own time, as it stood on its clock. */
function moment(date) {
  const [, year, month, day, hours, minutes] = /^(\d{4})-(\d\d)-(\d\d)(?:T(\d\d):(\d\d))?/.exec(date) ?? [];
  if (!year) return date;
  const style = hours ? { dateStyle: "long", timeStyle: "short" } : { dateStyle: "long" };
  return new Intl.DateTimeFormat(currentLanguage(), { ...style, timeZone: "UTC" }).format(Date.UTC(year, month - 1, day, hours ?? 0, minutes ?? 0));
}
