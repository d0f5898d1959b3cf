// Starts the page, after all parts are defined.

let kept = "";
try {
  kept = localStorage.getItem("rhythm-theme") ?? "";
} catch {}
for (const button of themes) button.addEventListener("click", () => setTheme(button.dataset.themeName));
readColors();
setPart(0);
setTheme(["light", "dark"].includes(kept) ? kept : "");
build(cuts(), 0);
