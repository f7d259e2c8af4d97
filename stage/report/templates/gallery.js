"use strict";
// Filters, order and paging. Where scripts are off all pictures stand there, the worst regressions first.
for (const gallery of document.querySelectorAll("[data-gallery]")) {
  const cards = [...gallery.querySelectorAll(".pair")];
  const list = gallery.querySelector(".pairs");
  const form = gallery.querySelector("form");
  const count = gallery.querySelector(".count");
  const more = gallery.querySelector(".more");
  const page = Number(gallery.dataset.page);
  const words = new Map(cards.map((card) => [card, card.querySelector("figcaption").textContent.toLowerCase()]));
  const number = (card, name) => Number(card.dataset[name]);
  const orders = {
    worst: (a, b) => number(a, "change") - number(b, "change") || number(a, "place") - number(b, "place"),
    best: (a, b) => number(b, "change") - number(a, "change") || number(a, "place") - number(b, "place"),
    listed: (a, b) => number(a, "place") - number(b, "place"),
  };
  let limit = page;

  const chosen = (name) => (form.elements[name] ? form.elements[name].value : "");
  const fits = (card) =>
    (!chosen("task") || card.dataset.task === chosen("task")) &&
    (!chosen("outcome") || card.dataset.outcome === chosen("outcome")) &&
    words.get(card).includes(chosen("words").trim().toLowerCase());

  const show = () => {
    const found = cards.filter(fits).sort(orders[chosen("order")]);
    const visible = new Set(found.slice(0, limit));
    for (const card of cards) card.hidden = !visible.has(card);
    list.append(...found);
    count.textContent = `${visible.size} of ${found.length} shown`;
    more.hidden = visible.size === found.length;
    return found;
  };

  form.addEventListener("input", () => {
    limit = page;
    show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const before = limit;
    limit += page;
    show()[before].focus(); // the first of the new ones, for those who go on by keyboard
  });
  form.hidden = false;
  show();
}
