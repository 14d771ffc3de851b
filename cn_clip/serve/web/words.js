// The language of the page: the reader's choice, else the browser's.
import { MESSAGES } from "./messages.js";

const KEY = "cn-clip.language";
const wanted = () => (navigator.languages ?? [navigator.language]).find((one) => /^(zh|en)\b/i.test(one)) ?? "en";
let language = localStorage.getItem(KEY) ?? wanted().slice(0, 2).toLowerCase();

/** "zh" or "en". */
export const currentLanguage = () => language;

/** The message, with {names} filled in; `{}` stays as it is. */
export function text(key, values = {}) {
  return MESSAGES[key][language].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

/** Whether there is such a message. */
export const hasText = (key) => Object.hasOwn(MESSAGES, key);

export const number = (value) => new Intl.NumberFormat(language).format(value);
export const percent = (value) =>
  new Intl.NumberFormat(language, { style: "percent", maximumFractionDigits: 1 }).format(value);

/** Shows the other language from now on. */
export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem(KEY, language);
}

/** Writes the words of what bears data-text, data-label or data-hint. */
export function fillIn(root) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const one of root.querySelectorAll("[data-text]")) one.textContent = text(one.dataset.text);
  for (const one of root.querySelectorAll("[data-label]")) {
    one.ariaLabel = text(one.dataset.label);
    if (one.matches("button, label")) one.title = one.ariaLabel;
  }
  for (const one of root.querySelectorAll("[data-hint]")) one.placeholder = text(one.dataset.hint);
}
