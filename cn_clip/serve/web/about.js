// What is known of the model and of the indexes, and what the keys do.
import { make } from "./dom.js";
import { ask } from "./server.js";
import { number, text } from "./words.js";

/** Shows the view. indexes: as /v1/index lists them. */
export async function showAbout(root, indexes) {
  const { data: models } = await ask("v1/models");
  const parts = models.flatMap((model) => [
    make("h2", { textContent: text("about.model") }),
    table([
      ["about.name", model.id],
      ["about.dimensions", number(model.embed_dim)],
      ["about.resolution", text("about.pixels", { count: number(model.resolution) })],
      ["about.length", text("about.tokens", { count: number(model.context_length) })],
    ]),
  ]);
  if (indexes.length) parts.push(make("h2", { textContent: text("about.indexes") }));
  const has = (one) => text(`has.${one}`);
  for (const one of indexes) {
    parts.push(table([
      ["about.name", one.name],
      ["about.model", one.model],
      ["about.count", number(one.count)],
      ["about.originals", has(one.has_originals)],
      ["about.thumbnails", has(one.has_thumbnails)],
      ["about.fields", one.fields.join("  ") || "—"],
    ]));
  }
  parts.push(make("h2", { textContent: text("about.keys") }), table([
    ["about.key.slash", "/"], ["about.key.arrows", "← ↑ → ↓"], ["about.key.enter", "Enter"], ["about.key.escape", "Esc"],
  ]));
  root.replaceChildren(...parts);
}

const table = (rows) => make("dl", { className: "about" }, ...rows.flatMap(([name, value]) => [make("dt", { textContent: text(name) }), make("dd", { textContent: value })]));
