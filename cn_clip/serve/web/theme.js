// Light or dark, before anything is drawn: the reader's choice, else the system's. No module, for modules come later.
const DARK = matchMedia("(prefers-color-scheme: dark)");

function setTheme() {
  const chosen = localStorage.getItem("cn-clip.theme");
  const isDark = chosen === "dark" || (chosen !== "light" && DARK.matches);
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
}

setTheme();
DARK.addEventListener("change", setTheme);
