// The pictures in rows of equal height, and how the keyboard moves among them.
import { icon, make } from "./dom.js";
import { named } from "./server.js";

// Widths over heights of a tile: what is longer is cut at its ends.
const NARROWEST = 0.45;
const WIDEST = 3.2;

/** What an item is called: its caption, else the name of its file. */
export function nameOf(item) {
  const { caption, file } = item.metadata;
  return String(caption || file || String(item.id).replace(/#t=[\d.]+$/, "").split("/").pop());
}

/** "1:05" of 65.2 seconds. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(Number(seconds) || 0));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** Width over height as a person sees it; null when the index does not say. */
export function ratioOf({ metadata: { width, height } }) {
  return width > 0 && height > 0 ? width / height : null;
}

/** Adds the items as tiles. addressOf: where a tile leads. */
export function addTiles(grid, items, addressOf) {
  const before = grid.children.length;
  const rowHeight = parseFloat(getComputedStyle(grid).getPropertyValue("--row"));
  grid.append(...items.map((item, position) => tile(item, before + position, rowHeight, addressOf(item))));
  if (before === 0) setCurrent(grid, 0);
}

function tile(item, position, rowHeight, href) {
  const name = nameOf(item);
  const ratio = ratioOf(item);
  const shown = Math.min(Math.max(ratio ?? 1, NARROWEST), WIDEST);
  const link = make("a", { href, className: "tile", tabIndex: -1 });
  if (item.thumbnail) {
    // Rows grow to fill the width, by up to a half.
    const longest = rowHeight * 1.3 * Math.max(1, shown) * Math.min(devicePixelRatio, 2);
    const size = longest <= 160 ? "small" : longest <= 320 ? "medium" : "large";
    const picture = make("img", { alt: name, decoding: "async", loading: position < 12 ? "eager" : "lazy" });
    if (position < 6) picture.fetchPriority = "high";
    if (ratio === null) picture.className = "whole";
    picture.src = named(item.thumbnail, { size });
    link.append(picture);
  } else {
    link.append(make("span", { className: "nothing", textContent: name }));
  }
  link.append(make("span", { className: "name", textContent: name, "aria-hidden": "true" }));
  if (item.metadata.kind === "video") {
    link.append(make("span", { className: "time" }, icon("play"), clock(item.metadata.time)));
  }
  const place = make("li", {}, link);
  place.style.setProperty("--ratio", shown.toFixed(4));
  return place;
}

/** The tile that the Tab key goes to. */
function setCurrent(grid, position) {
  for (const one of grid.querySelectorAll("a[tabindex='0']")) one.tabIndex = -1;
  const link = grid.children[position]?.firstChild;
  if (link) link.tabIndex = 0;
  return link;
}

/** Moves the focus to a tile. */
export function focusTile(grid, position) {
  const link = setCurrent(grid, position);
  link?.focus({ preventScroll: true });
  link?.scrollIntoView({ block: "nearest" });
}

/** Lets the arrows, Home and End move among the tiles. */
export function watchKeys(grid) {
  grid.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const tiles = [...grid.children];
    const at = tiles.indexOf(event.target.closest("li"));
    const to = {
      ArrowLeft: () => at - 1,
      ArrowRight: () => at + 1,
      ArrowUp: () => inRow(tiles, at, -1),
      ArrowDown: () => inRow(tiles, at, 1),
      Home: () => 0,
      End: () => tiles.length - 1,
    }[event.key]?.();
    if (to === undefined || at < 0) return;
    event.preventDefault();
    if (to >= 0 && to < tiles.length) focusTile(grid, to);
  });
  grid.addEventListener("focusin", (event) => {
    const place = event.target.closest("li");
    if (place) setCurrent(grid, [...grid.children].indexOf(place));
  });
}

/** The tile of the next row, or the one before, whose middle is nearest; `at` when there is no such row. */
function inRow(tiles, at, step) {
  const middle = (one) => one.offsetLeft + one.offsetWidth / 2;
  let row = null;
  let best = at;
  for (let one = at + step; one >= 0 && one < tiles.length; one += step) {
    if (tiles[one].offsetTop === tiles[at].offsetTop) continue;
    row ??= tiles[one].offsetTop;
    if (tiles[one].offsetTop !== row) break;
    if (best === at || Math.abs(middle(tiles[one]) - middle(tiles[at])) < Math.abs(middle(tiles[best]) - middle(tiles[at]))) best = one;
  }
  return best;
}
