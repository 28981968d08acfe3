"use strict";
// All that is shown comes from the data as text: nothing of it is ever markup.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const FIRST = 40;
let shown = FIRST;

function make(tag, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

function told(value) {
  if (value === null) return "unknown";
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : value.toFixed(2);
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return value.length ? value.map(told).join("\n") : "none";
  if (typeof value === "object") return Object.entries(value).map(([name, one]) => `${name}: ${told(one)}`).join("\n");
  return String(value);
}

function verdict(unit) {
  if ("why" in unit) return "missing";
  if ("correct" in unit) return unit.correct ? "right" : "wrong";
  if ("truth" in unit) return unit.answer === unit.truth ? "right" : "wrong";
  return "";
}

function article(item) {
  const node = make("article");
  const title = make("h2", item.id);
  for (const name of ["figure", "dialogue_f1"]) {
    if (item[name] !== null) title.append(make("span", `${name.replace("_", " ")} ${told(item[name])}`));
  }
  if (item.repcol) title.append(make("span", "falls into repetition"));
  node.append(title);
  if (item.video) {
    const video = make("video");
    video.controls = true;
    video.preload = "none";
    video.src = item.video;
    node.append(video);
  }
  const sides = make("div", undefined, "sides");
  for (const [name, text] of [["caption", item.caption], ["reference", item.reference]]) {
    if (text === null) continue;
    const side = make("section");
    side.append(make("h3", name), make("p", text, "text"));
    sides.append(side);
  }
  node.append(sides);
  if (item.units.length) {
    const units = make("details", undefined, "units");
    units.append(make("summary", `verdicts (${item.units.length})`));
    units.open = item.units.length === 1;
    for (const unit of item.units) {
      const list = make("dl", undefined, verdict(unit));
      for (const [name, value] of Object.entries(unit)) list.append(make("dt", name), make("dd", told(value)));
      units.append(list);
    }
    node.append(units);
  }
  return node;
}

function render() {
  const find = at("find").value.toLowerCase();
  const show = at("show").value;
  const sort = at("sort").value;
  let items = data.items.filter((item) =>
    (show !== "missing" || item.units.some((unit) => "why" in unit)) &&
    (show !== "repcol" || item.repcol) &&
    (!find || JSON.stringify([item.id, item.caption, item.units]).toLowerCase().includes(find)));
  if (sort !== "order") {
    const sign = sort === "up" ? 1 : -1;
    const known = items.filter((item) => item.figure !== null).sort((a, b) => sign * (a.figure - b.figure));
    items = [...known, ...items.filter((item) => item.figure === null)];
  }
  at("items").replaceChildren(...items.slice(0, shown).map(article));
  at("count").textContent = `${items.length} of ${data.items.length} clips`;
  at("more").hidden = items.length <= shown;
}

at("title").textContent = data.title;
at("model").textContent = data.model;
document.title = data.title;
const names = make("tr");
const values = make("tr");
for (const [name, value] of Object.entries(data.metrics)) {
  names.append(make("th", name.replaceAll("_", " ")));
  values.append(make("td", told(value)));
}
at("metrics").append(names, values);
at("notes").append(...data.notes.map((note) => make("li", note)));
for (const id of ["find", "show", "sort"]) {
  at(id).addEventListener("input", () => { shown = FIRST; render(); });
}
at("more").addEventListener("click", () => { shown += FIRST; render(); });
render();
