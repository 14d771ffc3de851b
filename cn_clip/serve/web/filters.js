// What narrows the pictures down: chips that open a small panel, and the condition that they make together.
import { find, icon, make } from "./dom.js";
import { text } from "./words.js";

/** The names of the filters among the state of the page. */
export const FILTERS = ["since", "until", "folder", "camera", "kind", "where"];
const CHIPS = {
  date: { field: "date", names: ["since", "until"] },
  folder: { field: "folder", names: ["folder"] },
  camera: { field: "camera", names: ["camera"] },
  kind: { field: "kind", names: ["kind"] },
  where: { field: null, names: ["where"] },
};

const quoted = (value) => `"${value.replace(/[\\"]/g, "\\$&")}"`;

/** The condition of the state, as the API takes it; undefined for none. */
export function condition(state) {
  const terms = [];
  if (state.since) terms.push(`date>=${quoted(state.since)}`);
  if (state.until) terms.push(`date<${quoted(dayAfter(state.until))}`);
  if (state.folder) terms.push(`folder~${quoted(state.folder)}`);
  if (state.camera) terms.push(`camera=${quoted(state.camera)}`);
  if (state.kind === "video") terms.push("kind=video");
  if (state.kind === "picture") terms.push("kind!=video");
  if (state.where) terms.push(terms.length ? `(${state.where})` : state.where);
  return terms.join(" ") || undefined;
}

function dayAfter(day) {
  const date = new Date(`${day}T00:00:00Z`);
  date.setUTCDate(date.getUTCDate() + 1);
  return date.toISOString().slice(0, 10);
}

/** What the chip of a filter says while it is set; null while it is not. */
function value(name, state) {
  if (name === "kind") return state.kind && text(`kind.${state.kind}`);
  if (name !== "date") return state[name];
  const { since, until } = state;
  if (since && until && since.slice(0, 4) === until.slice(0, 4) && since.endsWith("-01-01") && until.endsWith("-12-31")) {
    return since.slice(0, 4);
  }
  if (since && until) return since === until ? since : `${since} – ${until}`;
  if (since) return text("filter.from", { since });
  return until && text("filter.to", { until });
}

/**
 * The row of chips. fields: those that items of the index have. seen: values of fields among what is shown, to choose
 * from. change: called with the changes of the state.
 */
export function showFilters(root, { state, index, indexes, isSearch, seen, change }) {
  const panel = find("#panel");
  const wasOpen = panel.hidden ? null : panel.dataset.name;
  const focused = document.activeElement?.closest?.("#filters [data-key]")?.dataset.key;
  root.replaceChildren();
  if (indexes.length > 1) root.append(indexChoice(index, indexes, change));
  if (!isSearch && index.orders.length > 1) root.append(...orders(state, index, change));
  const context = { state, seen, change, panel };
  root.append(chip("not", { ...context, shown: null, label: text("filter.not") }));
  for (const [name, { field, names }] of Object.entries(CHIPS)) {
    const shown = value(name, state) || null;
    if (field !== null && shown === null && !index.fields.includes(field)) continue;
    root.append(chip(name, { ...context, shown, label: text(`filter.${name}`) }));
    if (shown !== null) root.append(clearing(text(`filter.${name}`), names, change));
  }
  if (FILTERS.filter((name) => state[name]).length > 1) {
    root.append(
      make("button", { type: "button", className: "quiet", textContent: text("filter.all"), onclick: () => change(none(FILTERS)) }),
    );
  }
  if (wasOpen) root.querySelector(`[data-key="${wasOpen}"]`)?.setAttribute("aria-expanded", "true");
  if (focused) root.querySelector(`[data-key="${focused}"]`)?.focus();
}

const none = (names) => Object.fromEntries(names.map((name) => [name, ""]));

function indexChoice(index, indexes, change) {
  const choice = make("select", { ariaLabel: text("index"), className: "chip" });
  choice.dataset.key = "index";
  choice.append(...indexes.map(({ name }) => make("option", { value: name, textContent: name, selected: name === index.name })));
  choice.onchange = () => change({ index: choice.value, ...none(FILTERS), like: [], unlike: [] });
  return choice;
}

function orders(state, index, change) {
  return index.orders.map((order) => {
    const isChosen = order === (state.order || index.orders[0]);
    const button = make("button", { type: "button", className: "chip", textContent: text(`order.${order}`), "aria-pressed": isChosen });
    button.dataset.key = `order-${order}`;
    button.onclick = () => change({ order });
    return button;
  });
}

function chip(name, { state, seen, change, panel, shown, label }) {
  const button = make(
    "button",
    { type: "button", className: shown ? "chip set" : "chip", "aria-expanded": "false", "aria-controls": "panel" },
    shown ? `${label}：${shown}`.replace("：", document.documentElement.lang === "en" ? ": " : "：") : label,
  );
  button.dataset.key = name;
  button.onclick = () => {
    const isOpen = button.getAttribute("aria-expanded") === "true";
    for (const one of document.querySelectorAll("#filters [aria-expanded]")) one.setAttribute("aria-expanded", "false");
    panel.hidden = isOpen;
    panel.replaceChildren();
    if (isOpen) return;
    button.setAttribute("aria-expanded", "true");
    panel.dataset.name = name;
    const close = (changes) => {
      panel.hidden = true;
      button.setAttribute("aria-expanded", "false");
      if (changes) change(changes);
      find(`#filters [data-key="${name}"]`)?.focus();
    };
    panel.append(form(name, state, seen, close));
    panel.onkeydown = (event) => {
      if (event.key === "Escape") close();
    };
    panel.querySelector("input, select, button").focus();
  };
  return button;
}

function clearing(label, names, change) {
  const button = make("button", { type: "button", className: "plain small", ariaLabel: text("filter.clear", { name: label }) }, icon("close"));
  button.onclick = () => change(none(names));
  return button;
}

/** What the panel of a filter holds; `close` takes the changes. */
function form(name, state, seen, close) {
  const inputs = {
    date: () => [field("since", "filter.since", { type: "date", value: state.since }), field("until", "filter.until", { type: "date", value: state.until })],
    folder: () => [field("folder", "filter.folder", { value: state.folder, list: "values" }), values(seen("folder"))],
    camera: () => [field("camera", "filter.camera", { value: state.camera, list: "values" }), values(seen("camera"))],
    where: () => [field("where", "filter.where", { value: state.where, placeholder: text("filter.where.hint"), size: 36 })],
    not: () => [field("not", "filter.not.field", { maxLength: 4096 })],
    kind: () => [],
  }[name]();
  const quick = (label, changes) => make("button", { type: "button", className: "chip", textContent: label, onclick: () => close(changes) });
  const years = name === "date" ? seen("date").map((date) => String(date).slice(0, 4)) : [];
  const chips = [...new Set(years)]
    .filter((year) => /^\d{4}$/.test(year))
    .sort()
    .reverse()
    .slice(0, 12)
    .map((year) => quick(year, { since: `${year}-01-01`, until: `${year}-12-31` }));
  if (name === "kind") chips.push(...["picture", "video"].map((kind) => quick(text(`kind.${kind}`), { kind })));
  const root = make("form", { className: "panel" }, ...chips, ...inputs);
  if (inputs.length) root.append(make("button", { className: "main", textContent: text("filter.apply") }));
  root.onsubmit = (event) => {
    event.preventDefault();
    const given = Object.fromEntries([...new FormData(root)].map(([key, one]) => [key, one.trim()]));
    close(name === "not" ? (given.not ? { not: [...state.not, given.not] } : undefined) : given);
  };
  return root;
}

function field(name, label, { list, ...properties }) {
  const input = make("input", { name, autocomplete: "off", ...properties, value: properties.value ?? "" });
  if (list) input.setAttribute("list", list);
  return make("label", {}, make("span", { textContent: text(label) }), input);
}

const values = (all) => make("datalist", { id: "values" }, ...[...new Set(all)].sort().slice(0, 200).map((one) => make("option", { value: one })));
