// The page: its state is in the part of its address behind #, so that the browser's back button works.
import { showAbout } from "./about.js";
import { find, icon, make } from "./dom.js";
import { condition, FILTERS, showFilters } from "./filters.js";
import { addTiles, focusTile, watchKeys } from "./grid.js";
import { forgetPicture, showLabels } from "./labels.js";
import { fileIn, keep, kept } from "./pictures.js";
import { address, ask, enter, onKeyWanted } from "./server.js";
import { viewer } from "./viewer.js";
import { fillIn, number, switchLanguage, text } from "./words.js";

const PAGE = 60;
// How much less the pictures should be like what is not wanted; at 1 it would drown what is.
const NOT = -0.5;
const RETRY_MS = 1500;
const VIEWS = ["pictures", "labels", "about"];
const SINGLE = ["view", "q", "index", "order", "open", "item", ...FILTERS];
const LISTS = ["not", "like", "unlike", "picture"];

const grid = find("#grid");
const status = find("#status");
const trouble = find("#trouble");

let indexes = null;
let state = read();
// What the grid shows: of which question, and what of its answer is there.
let shown = { question: null, items: [], total: null, isWhole: false, controller: null };
let labelView = null;

// --- the state

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = Object.fromEntries(SINGLE.map((name) => [name, given.get(name) ?? ""]));
  for (const name of LISTS) found[name] = given.getAll(name);
  if (!VIEWS.includes(found.view)) found.view = "pictures";
  return found;
}

function addressOf(one) {
  const parameters = new URLSearchParams();
  for (const name of SINGLE) if (one[name] && !(name === "view" && one.view === "pictures")) parameters.set(name, one[name]);
  for (const name of LISTS) for (const value of one[name]) parameters.append(name, value);
  return `#${parameters}`;
}

/** Goes to the state with these changes. replace: no step of its own for the back button. */
function go(changes, { replace = false, mark = null } = {}) {
  const to = addressOf({ ...state, ...changes });
  if (to === (location.hash || "#")) return;
  history[replace ? "replaceState" : "pushState"](mark, "", to);
  show();
}

const isSearch = () => Boolean(state.q || LISTS.some((name) => state[name].length));

function currentIndex() {
  return indexes.find(({ name }) => name === state.index) ?? indexes[0];
}

// --- what is shown

function show() {
  state = read();
  for (const name of VIEWS) find(`#${name}`).hidden = name !== state.view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === state.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = [state.q, text("title")].filter(Boolean).join(" · ");
  find("#search").hidden = state.view !== "pictures";
  if (indexes === null) return;
  if (state.view !== "pictures") large.close();
  if (state.view === "pictures") showPictures();
  if (state.view === "labels") labelView = showLabels(find("#labels"), labelledItem());
  if (state.view === "about") showAbout(find("#about"), indexes).catch((error) => tell(error));
}

function labelledItem() {
  if (!state.item) return null;
  const index = currentIndex()?.name;
  const thumbnail = address(`v1/index/thumbnails/${encodeURIComponent(state.item)}`, { index, size: "large" }).href;
  return { id: state.item, index, thumbnail };
}

function showPictures() {
  trouble.replaceChildren();
  if (!indexes.length) {
    status.textContent = text("no.index");
    trouble.replaceChildren(make("p", { textContent: text("no.index.hint") }), make("pre", { textContent: "cn-clip index build photos --output photos.index\ncn-clip serve photos.index" }));
    find("#search").hidden = true;
    return;
  }
  const gone = state.picture.filter((name) => kept(name) === undefined);
  if (gone.length) {
    go({ picture: state.picture.filter((name) => !gone.includes(name)) }, { replace: true });
    trouble.replaceChildren(make("p", { textContent: text("picture.gone") }));
    return;
  }
  const input = find("#query");
  if (document.activeElement !== input) input.value = state.q;
  input.placeholder = text(LISTS.some((name) => state[name].length) ? "search.more" : "search.hint");
  showParts();
  const question = addressOf({ ...state, open: "", item: "" });
  if (question !== shown.question) ask_(question);
  else sayCount();
  drawFilters();
  showOpened();
}

function drawFilters() {
  showFilters(find("#filters"), {
    state,
    index: currentIndex(),
    indexes,
    isSearch: isSearch(),
    seen: (field) => shown.items.map((item) => item.metadata[field]).filter((one) => one !== undefined && one !== null),
    change: go,
  });
}

function showParts() {
  const part = (list, value, label, source) => {
    const remove = make("button", { type: "button", className: "plain small", ariaLabel: text("part.remove", { name: label }) }, icon("close"));
    remove.onclick = () => {
      go({ [list]: state[list].filter((one) => one !== value) });
      find("#query").focus();
    };
    const picture = source ? make("img", { alt: "", src: source }) : null;
    // What only the server can read has no picture here.
    picture?.addEventListener("error", () => picture.remove());
    return make("li", { className: list === "not" || list === "unlike" ? "not" : "" }, picture, make("span", { textContent: label }), remove);
  };
  const small = (id) => address(`v1/index/thumbnails/${encodeURIComponent(id)}`, { index: currentIndex().name, size: "small" }).href;
  const parts = [
    ...state.picture.map((name) => part("picture", name, text("part.picture"), kept(name))),
    ...state.like.map((id) => part("like", id, text("part.like"), small(id))),
    ...state.unlike.map((id) => part("unlike", id, text("part.unlike"), small(id))),
    ...state.not.map((one) => part("not", one, text("part.not", { text: one }))),
  ];
  find("#parts").replaceChildren(...parts);
  find("#parts").hidden = !parts.length;
}

// --- asking

function query() {
  return [
    ...(state.q ? [{ text: state.q }] : []),
    ...state.picture.map((name) => ({ image: kept(name) })),
    ...state.like.map((id) => ({ id })),
    ...state.unlike.map((id) => ({ id, weight: NOT })),
    ...state.not.map((one) => ({ text: one, weight: NOT })),
  ];
}

/** A new question: the grid is emptied once its answer is there. */
function ask_(question) {
  shown.controller?.abort();
  shown = { question, items: [], total: null, isWhole: false, controller: null };
  status.textContent = text("loading");
  find("#panel").hidden = true;
  grid.setAttribute("aria-busy", "true");
  more();
}

/** The next pictures of the question. */
async function more() {
  if (shown.controller || shown.isWhole || indexes === null || !indexes.length || state.view !== "pictures") return;
  const asked = shown;
  asked.controller = new AbortController();
  try {
    const answer = await asked_(asked.items.length, asked.controller.signal);
    if (asked !== shown) return;
    if (!asked.items.length) grid.replaceChildren();
    asked.items.push(...answer.data);
    asked.total = answer.total ?? null;
    asked.isWhole = answer.data.length < PAGE || asked.items.length === asked.total;
    addTiles(grid, answer.data, (item) => addressOf({ ...state, open: String(item.id) }));
    asked.controller = null;
    trouble.replaceChildren();
    sayCount();
    drawFilters();
    showOpened();
    fill();
  } catch (error) {
    if (error.name === "AbortError" || asked !== shown) return;
    asked.controller = null;
    asked.isWhole = true;
    if (!asked.items.length) grid.replaceChildren();
    status.textContent = "";
    const again = () => {
      asked.isWhole = false;
      more();
    };
    tell(error, error.mayPass ? again : null);
  } finally {
    if (asked === shown) grid.removeAttribute("aria-busy");
  }
}

function asked_(offset, signal) {
  const index = currentIndex();
  const where = condition(state);
  if (isSearch()) {
    return ask("v1/search", { body: { query: query(), k: PAGE, offset, where, index: index.name }, signal });
  }
  const parameters = { index: index.name, order: state.order || index.orders[0], where, offset: String(offset), limit: String(PAGE) };
  return ask("v1/index/items", { parameters, signal });
}

/** Asks for more while the end of the grid is near. */
function fill() {
  if (find("#end").getBoundingClientRect().top < innerHeight * 2.5) more();
}

function sayCount() {
  const count = shown.items.length;
  if (shown.question === null || (shown.controller && !count)) return;
  if (!count) status.textContent = indexes && currentIndex().count === 0 ? text("empty") : `${text("none")} · ${text("none.hint")}`;
  else if (isSearch()) status.textContent = text("found", { count: number(count) });
  else status.textContent = shown.total === 1 ? text("count.one") : text("count", { count: number(shown.total) });
}

function tell(error, again = null) {
  console.info(error);
  const retry = again && make("button", { type: "button", className: "chip", textContent: text("retry"), onclick: again });
  trouble.replaceChildren(make("p", { textContent: error.sentence ?? String(error) }), ...(retry ? [retry] : []));
}

// --- one picture

let opened = null;

const large = viewer(find("#viewer"), {
  close() {
    const id = state.open;
    // As the back button would, if that leads to the same pictures.
    if (history.state === "opened") history.back();
    else go({ open: "" }, { replace: true });
    const at = shown.items.findIndex((item) => String(item.id) === id);
    large.close();
    if (at >= 0) focusTile(grid, at);
  },
  step(by) {
    const at = shown.items.findIndex((item) => String(item.id) === state.open);
    const next = shown.items[at + by];
    if (at + by > shown.items.length - 6) more();
    if (at >= 0 && next) go({ open: String(next.id) }, { replace: true, mark: history.state });
  },
  like: (item) => go({ ...nothing(), like: [String(item.id)] }),
  unlike: (item) => go({ open: "", unlike: [...state.unlike.filter((id) => id !== String(item.id)), String(item.id)].slice(-8) }),
  labels: (item) => {
    forgetPicture();
    go({ view: "labels", item: String(item.id), open: "" });
  },
});

const nothing = () => ({ q: "", not: [], like: [], unlike: [], picture: [], open: "", item: "", view: "pictures" });

/** Opens or closes the viewer as the state says. */
async function showOpened() {
  if (!state.open) {
    opened = null;
    large.close();
    return;
  }
  const at = shown.items.findIndex((item) => String(item.id) === state.open);
  const key = `${state.open} ${at} ${shown.items.length > at + 1}`;
  if (opened === key) return;
  if (at >= 0) {
    opened = key;
    large.show(shown.items[at], { position: at, hasPrevious: at > 0, hasNext: at + 1 < shown.items.length });
  } else if (!shown.controller) {
    // It came with the address, and is not among the first pictures.
    const id = state.open;
    const { data } = await ask("v1/search", { body: { query: { id }, k: 8, index: currentIndex().name } }).catch((error) => (tell(error), { data: [] }));
    const item = data.find((one) => String(one.id) === id);
    if (item && state.open === id) {
      opened = key;
      large.show({ ...item, score: null }, { position: null, hasPrevious: false, hasNext: false });
    } else if (state.open === id) go({ open: "" }, { replace: true });
  }
}

// --- what the reader does

async function take(transfer) {
  const file = fileIn(transfer);
  if (!file) return false;
  if (state.view === "labels") {
    await labelView?.take(transfer);
    return true;
  }
  const picture = await keep(file);
  go({ picture: [picture], like: [], unlike: [], open: "", view: "pictures" });
  return true;
}

function listen() {
  find("#search").onsubmit = (event) => {
    event.preventDefault();
    go({ q: find("#query").value.trim(), open: "" });
  };
  // The cross of the field empties it at once.
  find("#query").addEventListener("search", () => find("#query").value === "" && go({ q: "", open: "" }));
  find("#query").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" && grid.children.length) {
      event.preventDefault();
      focusTile(grid, 0);
    }
  });
  find("#choose").append(icon("picture"));
  find("#go").append(icon("search"));
  find("#choose").onclick = () => find("#file").click();
  find("#file").onchange = () => {
    take({ files: find("#file").files });
    find("#file").value = "";
  };
  grid.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const at = [...grid.children].indexOf(link.closest("li"));
    go({ open: String(shown.items[at].id) }, { mark: "opened" });
  });
  watchKeys(grid);
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.closest("input, textarea, select, dialog");
    if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || state.view !== "pictures") return;
    event.preventDefault();
    find("#query").select();
  });
  document.addEventListener("paste", async (event) => {
    if (fileIn(event.clipboardData)) {
      event.preventDefault();
      await take(event.clipboardData);
    }
  });
  listenToDrops();
  new IntersectionObserver((entries) => entries.some((one) => one.isIntersecting) && more(), { rootMargin: "150%" }).observe(find("#end"));
  addEventListener("popstate", show);
  addEventListener("hashchange", show);
}

function listenToDrops() {
  const target = find("#drop");
  const isFile = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => (target.hidden = !isFile(event)));
  document.addEventListener("dragover", (event) => isFile(event) && event.preventDefault());
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && (target.hidden = true));
  document.addEventListener("drop", async (event) => {
    target.hidden = true;
    if (!isFile(event)) return;
    event.preventDefault();
    await take(event.dataTransfer);
  });
}

// --- settings

const THEMES = ["auto", "light", "dark"];
const THEME = "cn-clip.theme";

function drawTheme() {
  const theme = localStorage.getItem(THEME) ?? "auto";
  setTheme(); // of theme.js
  const button = find("#theme");
  button.ariaLabel = button.title = text("theme", { theme: text(`theme.${theme}`) });
}

function listenToSettings() {
  find("#theme").append(icon("theme"));
  find("#theme").onclick = () => {
    const theme = localStorage.getItem(THEME) ?? "auto";
    localStorage.setItem(THEME, THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
    drawTheme();
  };
  find("#language").append(icon("language"));
  find("#language").onclick = () => {
    switchLanguage();
    fillIn(document);
    drawTheme();
    show();
  };
}

/** Asks for the key until the server takes one. */
function askForKey() {
  const dialog = find("#key");
  const field = find("#key-field");
  return new Promise((resolve) => {
    dialog.querySelector("form").onsubmit = async (event) => {
      event.preventDefault();
      try {
        await enter(field.value);
        field.value = "";
        dialog.close();
        resolve();
      } catch (error) {
        find("#key-trouble").textContent = error.sentence;
        field.select();
      }
    };
    dialog.oncancel = (event) => event.preventDefault();
    dialog.showModal();
    field.focus();
  });
}

async function start() {
  fillIn(document);
  drawTheme();
  listenToSettings();
  onKeyWanted(askForKey);
  listen();
  show();
  status.textContent = text("loading");
  while (indexes === null) {
    try {
      indexes = (await ask("v1/index")).data;
    } catch (error) {
      if (error.code === "index_not_found") indexes = [];
      else if (error.mayPass) {
        status.textContent = error.code === "not_ready" ? text("starting") : error.sentence;
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      } else {
        status.textContent = "";
        tell(error, () => location.reload());
        return;
      }
    }
  }
  show();
}

start();
