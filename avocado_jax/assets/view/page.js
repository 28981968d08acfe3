"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const LISTED = 200; // groups that are listed at once
const FEW = 40; // values that are drawn as dots, and not smoothed
const FIXED = ["reward", "advantage", "tokens"]; // values that stand first and last; the terms are between

/** An element. What is inside goes in as text, never as markup. */
function make(tag, attributes = {}, ...inside) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...inside);
  return node;
}

function draw(tag, attributes = {}, ...inside) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...inside);
  return node;
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("-", "−");
  const text = Number.isInteger(value) ? String(value) : value.toFixed(size < 10 ? 3 : size < 100 ? 2 : 1);
  return text.replace("-", "−");
}

// --- head

at("name").textContent = data.name;
document.title = `${data.name} – avocado view`;
const total = data.config.steps;
at("about").textContent = [
  { SftConfig: "fine-tuning", GrpoConfig: "GRPO" }[data.config.kind],
  `step ${data.curves.length ? Math.max(...data.curves.map((curve) => curve.steps.at(-1))) : 0}${total ? ` of ${total}` : ""}`,
  data.config.init && `from ${data.config.init}`,
  data.config.data?.train && `on ${data.config.data.train}`,
].filter(Boolean).join(" · ");
for (const note of data.notes) at("notes").append(make("li", {}, note));
at("config").textContent = JSON.stringify(data.config, null, 2);

function dark(on) {
  document.documentElement.classList.toggle("dark", on);
}
dark(matchMedia("(prefers-color-scheme: dark)").matches);
at("theme").onclick = () => dark(!document.documentElement.classList.contains("dark"));

for (const curve of data.curves.filter((one) => one.shown).slice(0, 8)) {
  const known = curve.values.filter((value) => value !== null);
  const tile = make("div", { class: "tile" }, make("span", {}, curve.name), make("b", {}, short(known.at(-1))));
  tile.append(make("span", {}, known.length > 1 ? `from ${short(known[0])}` : ""));
  at("tiles").append(tile);
}

// --- curves

const chosen = new Set(data.curves.filter((one) => one.shown).map((one) => one.name));
const charts = [];
const mean = Math.max(1, ...data.curves.map((one) => one.mean));
if (mean > 1) at("thinned").textContent = `each point is the mean of up to ${mean} steps`;

for (const curve of data.curves) {
  const button = make("button", { type: "button", "aria-pressed": chosen.has(curve.name) }, curve.name);
  button.onclick = () => {
    if (!chosen.delete(curve.name)) chosen.add(curve.name);
    button.setAttribute("aria-pressed", chosen.has(curve.name));
    drawCharts();
  };
  at("names").append(button);
}
at("smooth").oninput = drawCharts;

function drawCharts() {
  charts.length = 0;
  at("charts").replaceChildren(...data.curves.filter((one) => chosen.has(one.name)).map(chart));
}

/** An exponential mean in which the first values count in full. */
function smoothed(values, keep) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

/** Round numbers within [low, high], about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * unit).find((k) => k >= rough) ?? 10 * unit;
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

function tickText(value, span) {
  const size = Math.max(Math.abs(value), span);
  if (value !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1).replace("-", "−");
  return value.toFixed(Math.max(0, Math.min(6, 1 - Math.floor(Math.log10(span))))).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "").replace("-", "−");
}

function chart(curve) {
  const [wide, tall, left, right, top, bottom] = [360, 170, 46, 8, 8, 20];
  const known = curve.values.filter((value) => value !== null);
  let [low, high] = [Math.min(...known), Math.max(...known)];
  if (high - low <= 1e-9 * Math.abs(high)) [low, high] = [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
  const [first, last] = [curve.steps[0], Math.max(curve.steps.at(-1), curve.steps[0] + 1)];
  const x = (step) => left + ((step - first) / (last - first)) * (wide - left - right);
  const y = (value) => tall - bottom - ((value - low) / (high - low)) * (tall - top - bottom);
  const picture = draw("svg", { viewBox: `0 0 ${wide} ${tall}`, role: "img" });
  picture.append(draw("title", {}, curve.name));
  for (const value of ticks(low, high, 4)) {
    picture.append(draw("line", { class: "grid", x1: left, x2: wide - right, y1: y(value), y2: y(value) }));
    picture.append(draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, tickText(value, high - low)));
  }
  for (const step of ticks(first, last, 5).filter(Number.isInteger)) {
    picture.append(draw("text", { x: x(step), y: tall - 4, "text-anchor": "middle" }, String(step)));
  }
  const path = (values) => {
    let text = "", broken = true;
    values.forEach((value, k) => {
      if (value !== null) text += `${broken ? "M" : "L"}${x(curve.steps[k]).toFixed(1)},${y(value).toFixed(1)}`;
      broken = value === null;
    });
    return text;
  };
  const keep = known.length > FEW ? Number(at("smooth").value) : 0;
  const shown = keep ? smoothed(curve.values, keep) : curve.values;
  picture.append(draw("path", { class: keep ? "raw faint" : "raw", d: path(curve.values) }));
  if (keep) picture.append(draw("path", { class: "smooth", d: path(shown) }));
  if (known.length <= FEW) {
    curve.values.forEach((value, k) => {
      if (value !== null) picture.append(draw("circle", { cx: x(curve.steps[k]), cy: y(value), r: 2.5 }));
    });
  }
  const cross = draw("line", { class: "cross", y1: top, y2: tall - bottom, visibility: "hidden" });
  picture.append(cross);
  const lastKnown = shown.findLastIndex((value) => value !== null);
  const label = make("span");
  const told = (step) => {
    let k = lastKnown;
    if (step !== null) {
      const far = (one) => (shown[one] === null ? Infinity : Math.abs(curve.steps[one] - step));
      k = 0;
      for (let one = 1; one < shown.length; one++) if (far(one) < far(k)) k = one;
      cross.setAttribute("x1", x(curve.steps[k]));
      cross.setAttribute("x2", x(curve.steps[k]));
    }
    cross.setAttribute("visibility", step === null ? "hidden" : "visible");
    label.textContent = `${short(shown[k])} at ${curve.steps[k]}`;
  };
  told(null);
  charts.push(told);
  picture.onpointermove = (event) => {
    const box = picture.getBoundingClientRect();
    const share = (((event.clientX - box.left) / box.width) * wide - left) / (wide - left - right);
    const step = first + Math.max(0, Math.min(1, share)) * (last - first);
    for (const tell of charts) tell(step);
  };
  picture.onpointerleave = () => charts.forEach((tell) => tell(null));
  return make("div", { class: "chart", "data-curve": curve.name }, make("div", {}, make("b", {}, curve.name), label), picture);
}
drawCharts();

// --- captions

const state = { kind: "", step: "", sort: "step", how: "mean", down: true, term: "", least: -Infinity, most: Infinity, find: "", listed: LISTED, group: null };
const terms = termsOf(data.groups);

function termsOf(groups) {
  const names = new Set();
  for (const group of groups) for (const caption of group.captions) for (const name of Object.keys(caption.values)) names.add(name);
  const between = [...names].filter((name) => !FIXED.includes(name));
  return ["reward", ...between, "advantage", "tokens"].filter((name) => names.has(name));
}

function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
}

const fits = (caption) => {
  const value = state.term ? caption.values[state.term] ?? null : 0;
  if (state.term && (value === null || value < state.least || value > state.most)) return false;
  return true;
};
const says = (group, caption) =>
  !state.find || caption.text.toLowerCase().includes(state.find) || names[group.clip].toLowerCase().includes(state.find);
const counts = (group, caption) => fits(caption) && says(group, caption);

function valueOf(group, name, how) {
  const known = group.captions.map((caption) => caption.values[name] ?? null).filter((value) => value !== null);
  if (!known.length) return null;
  if (how === "best") return Math.max(...known);
  if (how === "worst") return Math.min(...known);
  const middle = known.reduce((a, b) => a + b, 0) / known.length;
  return how === "mean" ? middle : Math.sqrt(known.reduce((a, b) => a + (b - middle) ** 2, 0) / known.length);
}

/** Smaller first; unknown ones last, whatever the direction. */
function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return (a < b ? -1 : a > b ? 1 : 0) * (state.down ? -1 : 1);
}

function found() {
  const by = state.sort === "step" ? (group) => group.step : (group) => valueOf(group, state.sort, state.how);
  return data.groups
    .filter((group) => group.kind === state.kind && (!state.step || group.step === Number(state.step)))
    .filter((group) => group.captions.some((caption) => counts(group, caption)))
    .map((group) => [by(group), group])
    .sort(([a], [b]) => compare(a, b))
    .map(([, group]) => group);
}

const range = {}; // of each term, over all captions
const whole = {}; // whether all its values are integers
for (const name of terms) {
  const known = data.groups.flatMap((group) => group.captions.map((caption) => caption.values[name] ?? null)).filter((value) => value !== null);
  whole[name] = known.every(Number.isInteger);
  range[name] = known.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

/** A term's value, with as many decimals as the others in its column. */
function even(name, value) {
  const decimals = whole[name] ? (Number.isInteger(value) ? 0 : 1) : 3;
  return value === null ? "–" : (value + 0).toFixed(decimals).replace("-", "−");
}

/** A group's captions as dots between the least and the most of all. */
function dots(group, name) {
  const [low, high] = range[name] ?? [0, 1];
  const picture = draw("svg", { viewBox: "0 0 76 14" }, draw("line", { x1: 4, x2: 72, y1: 7, y2: 7 }));
  for (const caption of group.captions) {
    const value = caption.values[name] ?? null;
    if (value === null) continue;
    const x = high > low ? 4 + (68 * (value - low)) / (high - low) : 38;
    picture.append(draw("circle", { cx: x.toFixed(1), cy: 7, r: 3.5, class: counts(group, caption) ? "" : "out" }));
  }
  return picture;
}

// What all clips' names begin with says nothing in a list.
const names = data.clips.map((clip) => clip.id);
const common = names.reduce((a, b) => {
  let k = 0;
  while (k < a.length && a[k] === b[k]) k++;
  return a.slice(0, k);
}, names[0] ?? "");
const prefix = names.length > 1 ? common.search(/[^-_./]*$/) : 0;
const brief = (id) => (prefix > 4 ? `…${id.slice(prefix)}` : id);

let listed = [];
/** List what is asked for, and open the first of it, or keep what is open. */
function list(keep = false) {
  listed = found();
  const name = state.sort === "step" ? terms[0] : state.sort;
  const how = state.sort === "step" ? "mean" : state.how;
  at("groups").replaceChildren(...listed.slice(0, state.listed).map((group) => {
    const row = make("button", { class: "row", type: "button", "aria-current": group === state.group },
      make("span", { class: "num quiet" }, String(group.step)),
      make("bdi", { class: "clip", title: names[group.clip] }, brief(names[group.clip])),
      dots(group, name),
      make("span", { class: "num" }, name ? even(name, valueOf(group, name, how)) : ""));
    row.onclick = () => open(group);
    return row;
  }));
  at("more").hidden = listed.length <= state.listed;
  const captions = listed.reduce((sum, group) => sum + group.captions.filter((caption) => counts(group, caption)).length, 0);
  at("count").textContent = `${listed.length} clips, ${captions} captions`;
  open(keep && listed.includes(state.group) ? state.group : listed[0] ?? null);
  if (keep) at("groups").querySelector("[aria-current=true]")?.scrollIntoView({ block: "nearest" });
  else at("groups").scrollTop = 0;
  at("order").textContent = state.down ? "↓ high first" : "↑ low first";
  at("how").disabled = state.sort === "step";
}
at("more").onclick = () => { state.listed += LISTED; list(true); };

function open(group) {
  const other = group !== state.group;
  state.group = group;
  [...at("groups").children].forEach((row, k) => row.setAttribute("aria-current", listed[k] === group));
  if (!group) return at("group").replaceChildren(make("p", { class: "legend" }, "No caption matches."));
  const card = other || !at("group").firstChild?.matches(".clip-card") ? clipCard(data.clips[group.clip]) : at("group").firstChild;
  at("group").replaceChildren(card, ...(group.captions.some((one) => one.quotes || one.points) ? [legend()] : []), table(group));
}

at("groups").onkeydown = (event) => {
  const by = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1 }[event.key];
  const next = by && listed[listed.indexOf(state.group) + by];
  if (!next) return;
  event.preventDefault();
  open(next);
  at("groups").children[listed.indexOf(next)]?.scrollIntoView({ block: "nearest" });
};

// What a keypoint's number is hovered over, its words light up in every caption.
function light(point, on) {
  for (const node of at("group").querySelectorAll(`[data-points~="${point}"], [data-point="${point}"]`)) node.classList.toggle("lit", on);
}

function lights(node, point) {
  node.dataset.point = point;
  node.onpointerenter = () => light(point, true);
  node.onpointerleave = () => light(point, false);
  return node;
}

function clipCard(clip) {
  const card = make("div", { class: clip.video ? "clip-card" : "clip-card bare" });
  if (clip.video) {
    const film = make("video", { controls: "", preload: "metadata", src: clip.video });
    film.onerror = () => film.replaceWith(make("p", { class: "quiet" }, `cannot play ${clip.video}`));
    card.append(make("div", {}, film));
  }
  const told = make("div", {}, make("h3", {}, "Reference, ", make("bdi", {}, clip.id)));
  told.append(make("p", { class: "caption", dir: "auto" }, clip.caption ?? "no reference is known"));
  const lists = make("div", { class: "lists" });
  if (clip.dialogues?.length) {
    const items = clip.dialogues.map((line) => make("li", { dir: "auto" }, line.speaker ? `${line.speaker}: ` : "", make("bdi", {}, `“${line.text}”`)));
    lists.append(make("div", {}, make("h3", {}, "Lines"), make("ol", {}, ...items)));
  }
  if (clip.keypoints?.length) {
    const items = clip.keypoints.map((point, k) => lights(make("li", {}, make("bdi", {}, point.text), make("span", { class: "dimension" }, point.dimension ?? "")), k));
    lists.append(make("div", {}, make("h3", {}, "Keypoints"), make("ol", {}, ...items)));
  }
  told.append(lists);
  card.append(told);
  return card;
}

function legend() {
  const kinds = [["quote same", "line and speaker agree"], ["quote other", "line agrees, another speaker"], ["quote none", "quoted, in no reference line"], ["point", "words of a stated keypoint"]];
  const spans = kinds.map(([name, text]) => make("span", {}, make("span", { class: name }, "words"), ` ${text}`));
  return make("div", { class: "legend" }, ...spans, make("span", {}, "(matches of the lexical judge)"));
}

function table(group) {
  const head = make("tr", {}, make("th", {}, "#"));
  for (const name of terms) {
    const button = make("button", { type: "button" }, name + (state.sort === name ? (state.down ? " ↓" : " ↑") : ""));
    button.onclick = () => {
      state.down = state.sort === name ? !state.down : true;
      at("sort").value = state.sort = name;
      list(true);
    };
    head.append(make("th", { class: "num", ...(state.sort === name && { "aria-sort": state.down ? "descending" : "ascending" }) }, button, weight(name)));
  }
  head.append(make("th"));
  const by = state.sort === "step" ? (caption) => -caption.number * (state.down ? 1 : -1) : (caption) => caption.values[state.sort] ?? null;
  const rows = group.captions.map((caption) => [by(caption), caption]).sort(([a], [b]) => compare(a, b)).flatMap(([, caption]) => {
    const out = counts(group, caption) ? "" : " out";
    const numbers = make("tr", { class: `numbers${out}` }, make("td", { class: "num quiet" }, String(caption.number + 1)));
    for (const name of terms) {
      const value = caption.values[name] ?? null;
      const sign = name !== "advantage" || !value ? "" : value > 0 ? " plus" : " minus";
      numbers.append(make("td", { class: `num${sign}${data.weights[name] === 0 ? " unweighted" : ""}`, "data-term": name }, (sign === " plus" ? "+" : "") + even(name, value)));
    }
    numbers.append(make("td", { style: "width:100%" }));
    const said = make("td", { colspan: terms.length + 2 });
    if (caption.points) said.append(pills(caption.points));
    said.append(marked(caption));
    return [numbers, make("tr", { class: `said${out}` }, said)];
  });
  return make("div", { class: "table" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

/** The weight of a reward term, for the head of its column; nothing for other values. */
function weight(name) {
  if (!(name in data.weights)) return "";
  const value = data.weights[name];
  const title = value === 0 ? "weight 0: not part of the reward" : "weight in the reward";
  return make("span", { class: value === 0 ? "weight unweighted" : "weight", title }, ` × ${short(value)}`);
}

function pills(points) {
  const node = make("div", { class: "pills" }, make("span", { class: "quiet" }, "keypoints"));
  points.forEach(([score, covered], k) => {
    const pill = make("span", { class: `pill${score >= 0.999 ? " stated" : score > 0 ? " partly" : ""}` }, String(k + 1));
    pill.title = `${short(score)}; ${Math.round(covered * 100)}% of its words are near each other`;
    node.append(lights(pill, k));
  });
  return node;
}

/** A caption's text with its quotes and the words of keypoints as spans. Places count code points. */
function marked(caption) {
  const letters = Array.from(caption.text);
  const quotes = caption.quotes ?? [];
  const words = (caption.points ?? []).flatMap(([, , ...places], k) =>
    Array.from({ length: places.length / 2 }, (_, n) => [places[2 * n], places[2 * n + 1], k]));
  const edges = new Set([0, letters.length]);
  for (const [first, last] of [...quotes, ...words]) edges.add(first).add(last);
  const cuts = [...edges].sort((a, b) => a - b);
  const node = make("p", { class: "caption", dir: "auto" });
  let quote = null;
  cuts.slice(0, -1).forEach((first, n) => {
    const text = letters.slice(first, cuts[n + 1]).join("");
    const own = words.filter(([from, to]) => from <= first && first < to).map(([, , k]) => k);
    const inside = quotes.find(([from, to]) => from <= first && first < to);
    const piece = own.length ? make("span", { class: "point", "data-points": own.join(" ") }, text) : text;
    if (own.length) piece.title = own.map((k) => `keypoint ${k + 1}`).join(", ");
    if (!inside) {
      quote = null;
      return node.append(piece);
    }
    if (quote?.of !== inside) {
      const [, , line, alike, same] = inside;
      quote = { of: inside, node: make("span", { class: `quote ${line < 0 ? "none" : same ? "same" : "other"}` }) };
      quote.node.title = line < 0 ? "in no line of the reference" : `line ${line + 1}, similarity ${short(alike)}, ${same ? "the same speaker" : "another speaker"}`;
      node.append(quote.node);
    }
    quote.node.append(piece);
  });
  return node;
}

// --- controls

const kinds = [...new Set(data.groups.map((group) => group.kind))];
if (kinds.length) {
  at("browser").hidden = false;
  options(at("kind"), kinds.map((kind) => [kind, { rollouts: "rollouts", samples: "held-out captions" }[kind]]));
  options(at("sort"), [["step", "step"], ...terms.map((name) => [name, name])]);
  options(at("term"), [["", "any values"], ...terms.map((name) => [name, name])]);
  const steps = () => {
    const all = [...new Set(data.groups.filter((group) => group.kind === state.kind).map((group) => group.step))];
    options(at("step"), [["", "all"], ...all.sort((a, b) => b - a).map((step) => [step, step])]);
    state.step = "";
  };
  state.kind = kinds[0];
  steps();
  at("kind").onchange = () => { state.kind = at("kind").value; steps(); list(); };
  at("order").onclick = () => { state.down = !state.down; list(); };
  for (const name of ["step", "sort", "how", "term"]) at(name).onchange = () => { state[name] = at(name).value; state.listed = LISTED; list(); };
  const limit = (name, none) => { at(name).oninput = () => { state[name] = at(name).value === "" ? none : Number(at(name).value); list(); }; };
  limit("least", -Infinity);
  limit("most", Infinity);
  at("find").oninput = () => { state.find = at("find").value.toLowerCase(); list(); };
  list();
}
