"use strict";
// Text of stays is only ever written with textContent. Nothing is stored in the browser: decisions live until the page is
// closed, which asks first if some are not downloaded.
const { kind, columns, stays } = JSON.parse(document.getElementById("data").textContent);
const words = JSON.parse(document.getElementById("words").textContent);
const byId = id => document.getElementById(id);
let knownCodes = null; // parsed when a code is typed for the first time
let shown = stays, current = null, saved = true;

for (const stay of stays) {
  stay.lower = [stay.stay, stay.text, ...stay.items.flatMap(item => [item.coded, item.proposed, item.label])].join("\n").toLowerCase();
  stay.done = "";
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}

function codes() {
  knownCodes = knownCodes || JSON.parse(byId("codes").textContent);
  return knownCodes;
}

function labelOf(code) {
  const found = codes().find(entry => entry[0] === code);
  return found ? found[1] : "";
}

const percent = chance => chance === null ? "not known" : (100 * chance).toFixed(0) + "\u00a0%";

function nameOf(item) {
  if (item.decision === words.added) return item.final;
  if (item.coded && item.proposed) return item.coded + " → " + item.proposed;
  if (item.coded) return "remove " + item.coded;
  return (kind === "second_reading" ? "add " : "") + item.proposed;
}

// --- The list -----------------------------------------------------------------------------------------------------

function isShown(stay) {
  const state = byId("state").value, role = byId("role").value, search = byId("search").value.trim().toLowerCase();
  return (!state || (state === "done") === Boolean(stay.done))
    && (!byId("decision").value || stay.decision === byId("decision").value)
    && (!role || stay.items.some(item => item.role === role))
    && [...document.querySelectorAll("[data-fact]")].every(box => !box.value || stay.facts[box.dataset.fact] === box.value)
    && (!search || stay.lower.includes(search));
}

function order(one, other) {
  const by = byId("order").value;
  const names = one.stay < other.stay ? -1 : one.stay > other.stay ? 1 : 0;
  if (by === "stay") return names;
  return (by === "reverse" ? one.priority - other.priority : other.priority - one.priority) || names;
}

function listed(stay) {
  const main = stay.items.find(item => item.role === "DP") || stay.items[0];
  const name = main ? (main.role || "?") + " " + nameOf(main) : "no code";
  const button = element("button", { type: "button", onclick: () => open(stay) },
    element("span", { textContent: stay.stay }),
    element("span", { textContent: stay.done ? "✓" : stay.decision === "auto" ? "auto" : "" }),
    element("span", { className: "muted", textContent: name + (main ? " " + main.label : "") }),
    element("span", { className: "muted", textContent: main ? percent(main.confidence) : "" }));
  button.setAttribute("aria-current", stay === current);
  return element("li", {}, button);
}

function list() {
  shown = stays.filter(isShown).sort(order);
  byId("stays").replaceChildren(...shown.map(listed));
  progress();
}

function progress() {
  const done = stays.filter(stay => stay.done).length;
  const begun = stays.filter(stay => !stay.done && stay.items.some(item => item.decision)).length;
  byId("progress").textContent = `${shown.length} of ${stays.length} stays shown, ${done} reviewed`
    + (begun ? `, ${begun} begun (not in the file)` : "");
  byId("download").disabled = !done;
}

function refresh(stay) { // the line of one stay, which stays in the list until the filters change
  const place = shown.indexOf(stay);
  if (place >= 0) byId("stays").children[place].replaceWith(listed(stay));
  progress();
}

// --- One stay -----------------------------------------------------------------------------------------------------

function open(stay) {
  const before = current;
  current = stay;
  if (before) refresh(before);
  if (stay) refresh(stay);
  draw();
  byId("stay").focus({ preventScroll: true });
  if (byId("stay").getBoundingClientRect().top > innerHeight / 2) byId("stay").scrollIntoView();
}

function decide(stay, item, decision, final) {
  Object.assign(item, { decision, final, choosing: false });
  settle(stay);
}

function settle(stay) {
  saved = false;
  const whole = stay.items.every(item => item.decision);
  stay.done = whole && stay.items.length ? new Date().toISOString().slice(0, 19) + "Z" : "";
  refresh(stay);
  draw();
}

function action(text, pressed, onclick) {
  const button = element("button", { type: "button", textContent: text, onclick });
  button.setAttribute("aria-pressed", pressed);
  return button;
}

function drawItem(stay, item) {
  const label = item.decision === words.replaced || item.decision === words.added ? labelOf(item.final) : item.label;
  const replaced = item.decision === words.replaced ? " → " + item.final : "";
  const name = element("div", { className: "name" },
    element("b", { textContent: (item.role || "?") + " " + nameOf(item) + replaced }), " " + label + " ",
    item.decision === words.added ? null : element("small", { textContent: "confidence " + percent(item.confidence) }),
    ...item.evidence.map(sentence => element("q", { textContent: sentence.text + (sentence.about ? " (" + sentence.about + ")" : "") })));
  name.onmouseenter = () => highlight(stay, item);
  const actions = element("div", { className: "actions" });
  if (item.decision === words.added) {
    actions.append(action("Remove", false, () => { stay.items.splice(stay.items.indexOf(item), 1); settle(stay); }));
  } else {
    actions.append(
      action("Accept", item.decision === words.accepted, () => decide(stay, item, words.accepted, item.proposed)),
      action("Refuse", item.decision === words.refused, () => decide(stay, item, words.refused, item.coded)),
      action("Replace", item.decision === words.replaced, () => { item.choosing = !item.choosing; draw(); }));
  }
  return element("li", {}, name, actions,
    item.choosing ? chooser("Code in place of it", code => decide(stay, item, words.replaced, code)) : null);
}

function chooser(title, chosen) {
  const problem = element("span", { className: "problem" });
  const input = element("input", { placeholder: title + ": code or label", autocomplete: "off" });
  input.setAttribute("aria-label", title);
  const options = element("ul", { className: "options" });
  input.oninput = () => options.replaceChildren(...matching(input.value).map(([code, label]) => element("li", {},
    element("button", { type: "button", textContent: code + " " + label, onclick: () => chosen(code) }))));
  const take = () => {
    const code = input.value.toUpperCase().replace(/[\s.]/g, "");
    const isKnown = codes().length ? codes().some(entry => entry[0] === code) : /^[A-Z]\d{2}/.test(code);
    if (isKnown) chosen(code); else problem.textContent = "Not a code of the CIM-10 table.";
  };
  input.onkeydown = event => { if (event.key === "Enter") { event.preventDefault(); take(); } };
  setTimeout(() => input.focus());
  return element("div", { className: "choose" }, input, element("button", { type: "button", textContent: "Take", onclick: take }), problem, options);
}

function matching(text) {
  const typed = text.trim().toLowerCase(), code = typed.replace(/\./g, "").toUpperCase();
  if (typed.length < 2) return [];
  const found = codes().filter(entry => entry[0].startsWith(code));
  return found.concat(codes().filter(entry => !entry[0].startsWith(code) && entry[1].toLowerCase().includes(typed))).slice(0, 8);
}

function adder(stay) {
  const role = element("select", {}, ...["DAS", "DP", "DR"].map(name => element("option", { textContent: name })));
  role.setAttribute("aria-label", "Role of the code to add");
  const box = chooser("Add a code", code => {
    stay.items.push({ role: role.value, coded: "", proposed: "", label: "", confidence: null, evidence: [], decision: words.added, final: code });
    settle(stay);
  });
  box.prepend(role);
  return box;
}

function draw() {
  const stay = current;
  if (!stay) { byId("stay").replaceChildren(); return; }
  const acceptAll = action("Accept the rest", false, () => {
    for (const item of stay.items) if (!item.decision) Object.assign(item, { decision: words.accepted, final: item.proposed });
    settle(stay);
  });
  acceptAll.id = "accept-all";
  const next = action("Next stay", false, () => open(shown[shown.indexOf(stay) + 1] || shown[0]));
  next.id = "next";
  const about = [stay.decision, stay.reason, ...Object.values(stay.facts)].filter(Boolean).join(" · ");
  const small = text => text ? element("p", { className: "small", textContent: text }) : null;
  byId("stay").replaceChildren(...[
    element("h2", { textContent: "Stay " + stay.stay }),
    small(about),
    ...stay.broken.map(rule => element("p", { className: "problem", textContent: rule })),
    element("ul", { className: "items" }, ...stay.items.map(item => drawItem(stay, item))),
    small(stay.agreed.length ? "Both: " + stay.agreed.map(code => [code.role, code.code, code.label || labelOf(code.code)].filter(Boolean).join(" ")).join(", ") : ""),
    element("div", { className: "actions" }, acceptAll, next,
      action("Add a code", false, () => { stay.adding = !stay.adding; draw(); })),
    stay.adding ? adder(stay) : null,
    stay.text ? element("h2", { textContent: "Note" }) : null,
    stay.text ? element("div", { className: "note" }, ...marked(stay)) : null,
  ].filter(Boolean));
}

// --- Evidence in the note -----------------------------------------------------------------------------------------

function marked(stay) {
  const spans = [];
  stay.items.forEach(item => item.evidence.forEach(sentence => {
    const start = sentence.text ? stay.text.indexOf(sentence.text) : -1;
    if (start >= 0) spans.push({ start, end: start + sentence.text.length, code: item.proposed });
  }));
  spans.sort((one, other) => one.start - other.start);
  const parts = [];
  let place = 0;
  for (const span of spans) {
    if (span.end <= place) continue; // the same sentence for another code
    const start = Math.max(span.start, place);
    parts.push(stay.text.slice(place, start));
    const mark = element("mark", { textContent: stay.text.slice(start, span.end), title: span.code });
    mark.dataset.sentence = stay.text.slice(span.start, span.end);
    parts.push(mark);
    place = span.end;
  }
  parts.push(stay.text.slice(place));
  return parts;
}

function highlight(stay, item) {
  for (const mark of document.querySelectorAll(".note mark"))
    mark.classList.toggle("shown", item.evidence.some(sentence => sentence.text === mark.dataset.sentence));
}

// --- The file of decisions ----------------------------------------------------------------------------------------

function cell(value) { // as utils/tables/csv_cells.py writes it: a spreadsheet must not run a cell as a formula
  const text = /^'*[=+\-@\t\r\n＝＋－＠]/.test(value) ? "'" + value : value;
  return /[",;\r\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
}

function csv() {
  const lines = [columns];
  for (const stay of stays.filter(stay => stay.done))
    for (const item of stay.items)
      lines.push(columns.map(name => name === "stay" || name === "note" ? stay[name]
        : name === "reviewer" ? byId("reviewer").value.trim() : name === "time" ? stay.done : item[name]));
  return lines.map(line => line.map(value => cell(String(value))).join(",") + "\n").join("");
}

byId("download").onclick = () => {
  const link = element("a", { href: URL.createObjectURL(new Blob([csv()], { type: "text/csv" })), download: "decisions.csv" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  saved = true;
};
addEventListener("beforeunload", event => { if (!saved) event.preventDefault(); });
byId("filters").oninput = list;
byId("filters").onsubmit = event => event.preventDefault();
list();
if (shown.length) open(shown[0]);
