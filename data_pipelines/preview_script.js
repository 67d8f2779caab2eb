"use strict";
const search = document.getElementById("search");
const told = document.getElementById("told");
const nothing = document.getElementById("nothing");
const buttons = [...document.querySelectorAll("button[data-modalities]")];
const searched = (node) => [...node.querySelectorAll(".key, blockquote, .label, dl")].map((part) => part.textContent);
const cards = [...document.querySelectorAll("article")].map((node) => (
  { node, text: searched(node).join("\n").toLowerCase() }
));
let modalities = "";

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const { node, text } of cards) {
    const fits = (!modalities || node.dataset.modalities === modalities) && words.every((word) => text.includes(word));
    node.hidden = !fits;
    shown += fits;
  }
  told.textContent = `${shown} of ${cards.length} shown`;
  nothing.hidden = shown > 0;
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    modalities = button.dataset.modalities;
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    filter();
  });
}
search.addEventListener("input", filter);
// One sound at a time.
document.addEventListener("play", (event) => {
  for (const player of document.querySelectorAll("audio")) if (player !== event.target) player.pause();
}, true);
filter();
