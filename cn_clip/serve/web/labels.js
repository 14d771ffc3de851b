// Zero-shot labels: a picture, labels and templates that the reader writes, and how probable each label is.
import { make } from "./dom.js";
import { fileIn, keep, kept } from "./pictures.js";
import { ask } from "./server.js";
import { percent, text } from "./words.js";

const given = { picture: null, labels: null, templates: null };

/** Shows the view. item: an item of an index, {id, index, thumbnail}, in place of a picture of the reader's. */
export function showLabels(root, item) {
  const values = { labels: given.labels ?? text("labels.default"), templates: given.templates ?? text("labels.template") };
  const area = (name, rows) => {
    const field = make("textarea", { value: values[name], rows, spellcheck: false });
    field.oninput = () => (given[name] = field.value);
    return { field, label: make("label", {}, make("span", { textContent: text(`labels.${name}`) }), field) };
  };
  const labels = area("labels", 8);
  const templates = area("templates", 2);
  const file = make("input", { type: "file", hidden: true, ariaLabel: text("labels.picture") });
  const shown = make("img", { alt: text("labels.picture"), hidden: true });
  const choose = make("button", { type: "button", className: "choose" });
  const results = make("div", { className: "results" });
  const trouble = make("p", { role: "alert", className: "trouble" });
  const said = make("p", { role: "status", className: "announced" });

  const picture = () => (given.picture ? { image: kept(given.picture) } : item ? { id: item.id, index: item.index } : null);
  const showPicture = () => {
    const source = given.picture ? kept(given.picture) : item?.thumbnail;
    shown.hidden = !source;
    if (source) shown.src = source;
    choose.textContent = text(source ? "labels.other" : "labels.choose");
  };
  const run = async () => {
    const query = picture();
    trouble.textContent = query ? "" : text("labels.none");
    if (!query) return;
    const lines = (value) => value.split("\n").map((one) => one.trim()).filter(Boolean);
    const body = { ...query, labels: [...new Set(lines(labels.field.value))], templates: lines(templates.field.value) };
    results.setAttribute("aria-busy", "true");
    try {
      const { data } = await ask("v1/classify", { body });
      results.replaceChildren(bars(data));
      said.textContent = text("labels.best", { label: data[0].label, share: percent(data[0].probability) });
    } catch (error) {
      results.replaceChildren();
      trouble.textContent = error.sentence ?? String(error);
    }
    results.removeAttribute("aria-busy");
  };
  const take = async (chosen) => {
    if (!chosen) return;
    given.picture = await keep(chosen);
    showPicture();
    await run();
  };

  choose.onclick = () => file.click();
  file.onchange = () => take(file.files[0]);
  root.replaceChildren(
    make("form", { className: "labelling", onsubmit: (event) => { event.preventDefault(); run(); } },
      make("div", { className: "given" },
        make("div", { className: "frame" }, shown, choose, file),
        labels.label,
        templates.label,
        make("button", { className: "main", textContent: text("labels.run") })),
      make("div", { className: "answer" },
        make("h2", { textContent: text("labels.results") }),
        trouble, said, results,
        make("p", { className: "note", textContent: text("labels.note") }))));
  showPicture();
  if (picture()) run();
  return { take: (transfer) => take(fileIn(transfer)) };
}

/** Forgets the reader's picture, so that an item of the index takes its place. */
export const forgetPicture = () => (given.picture = null);

function bars(data) {
  return make("ol", { className: "bars" }, ...data.slice(0, 50).map(({ label, probability, cosine }) => {
    const bar = make("span", { className: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", probability);
    const row = make("li", { title: `cos ${cosine.toFixed(3)}` }, make("span", { className: "label", textContent: label }), make("span", { className: "share", textContent: percent(probability) }), bar);
    return row;
  }));
}
