// Light or dark, as the system has it or as chosen: set before anything is painted.
(() => {
  const root = document.documentElement, name = "garserve-theme";
  const chosen = (() => { try { return localStorage.getItem(name); } catch { return null; } })();
  if (chosen) root.dataset.theme = chosen;
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      try { localStorage.setItem(name, root.dataset.theme); } catch { /* a browser that keeps nothing */ }
    });
  });
})();
