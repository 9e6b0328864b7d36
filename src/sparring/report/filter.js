"use strict";
// Filters and search of the samples. The page is whole without it; what it needs is hidden until it runs.
(() => {
  const box = document.getElementById("filter");
  const list = document.getElementById("samples");
  if (!box || !list) return;
  const kind = document.getElementById("kind");
  const search = document.getElementById("search");
  const count = document.getElementById("count");
  const samples = [...list.querySelectorAll("details")];
  const margin = (sample) => (sample.dataset.margin === "" ? Infinity : Number(sample.dataset.margin));
  function apply() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const order = kind.value === "worst" ? [...samples].sort((a, b) => margin(a) - margin(b)) : samples;
    let shown = 0;
    for (const sample of order) {
      const text = sample.textContent.toLowerCase();
      const isKind = kind.value === "all" || kind.value === "worst" || sample.dataset[kind.value] === "yes";
      sample.hidden = !(isKind && words.every((word) => text.includes(word)));
      shown += sample.hidden ? 0 : 1;
      list.append(sample);
    }
    count.textContent = `${shown} of ${samples.length} shown`;
  }
  kind.addEventListener("change", apply);
  search.addEventListener("input", apply);
  box.hidden = false;
  apply();
})();
