// Elements from values. Whatever comes from the index becomes text or an attribute here, never markup.

/** An element: properties by their names in scripts, attributes where a name has a dash. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((one) => one !== null && one !== undefined));
  return element;
}

export const find = (selector) => document.querySelector(selector);

/** An icon of icons.svg, which readers of the screen pass over. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `page/icons.svg#${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}
