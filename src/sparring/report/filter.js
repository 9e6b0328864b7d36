"use strict";
// Filters, searches and compares the samples. The page works without it: its controls stay hidden until it runs.
(() => {
  const box = document.getElementById("filter");
  const list = document.getElementById("samples");
  if (!box || !list) return;
  const [kind, search, left, right, count] = ["kind", "search", "left", "right", "count"].map((id) => document.getElementById(id));
  const samples = [...list.querySelectorAll("details")];
  const texts = new Map(samples.map((sample) => [sample, sample.textContent.toLowerCase()]));
  const original = new Map([...list.querySelectorAll(".response pre")].map((pre) => [pre, pre.textContent]));
  const margin = (sample) => (sample.dataset.margin === "" ? Infinity : Number(sample.dataset.margin));
  const MAX_WORDS = 600;

  // Marks the words of `text` outside its longest common subsequence with `other`.
  function mark(pre, text, other) {
    const [a, b] = [text.split(/(\s+)/), other.split(/(\s+)/)];
    pre.textContent = text;
    if (a.length > MAX_WORDS || b.length > MAX_WORDS) return;
    const longest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        longest[i][j] = a[i] === b[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    pre.textContent = "";
    for (let i = 0, j = 0; i < a.length; i++) {
      while (j < b.length && a[i] !== b[j] && longest[i][j + 1] > longest[i + 1][j]) j++;
      const isCommon = j < b.length && a[i] === b[j];
      if (isCommon) j++;
      const isWord = a[i].trim() !== "";
      const node = document.createElement(isCommon || !isWord ? "span" : "mark");
      node.textContent = a[i];
      pre.append(node);
    }
  }

  function compare() {
    const names = left.value === "" ? null : [left.value, right.value];
    for (const sample of samples) {
      const responses = [...sample.querySelectorAll(".response")];
      for (const response of responses) {
        const pre = response.querySelector("pre");
        response.hidden = names !== null && !names.includes(response.dataset.source);
        if (pre.childElementCount) pre.textContent = original.get(pre);
      }
      if (names === null) continue;
      const [one, two] = names.map((name) => responses.find((response) => response.dataset.source === name)?.querySelector("pre"));
      if (!one || !two || one === two) continue;
      mark(one, original.get(one), original.get(two));
      mark(two, original.get(two), original.get(one));
    }
  }

  function apply() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const order = kind.value === "worst" ? [...samples].sort((a, b) => margin(a) - margin(b)) : samples;
    let shown = 0;
    for (const sample of order) {
      const isKind = kind.value === "all" || kind.value === "worst" || sample.dataset[kind.value] === "yes";
      sample.hidden = !(isKind && words.every((word) => texts.get(sample).includes(word)));
      shown += sample.hidden ? 0 : 1;
      list.append(sample);
    }
    count.textContent = `${shown} of ${samples.length} shown`;
  }

  kind.addEventListener("change", apply);
  search.addEventListener("input", apply);
  left.addEventListener("change", compare);
  right.addEventListener("change", compare);
  box.hidden = false;
  apply();
})();
