"use strict";
// What all pages share: elements, numbers, charts and the theme. All text goes into the document as text, never as markup.
const main = document.getElementById("main");
const charts = []; // redrawn on another theme or size

// --- elements ------------------------------------------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function section(id, title, ...children) {
  const heading = element("h2", { id: `${id}-title` }, title);
  main.append(element("section", { id, "aria-labelledby": `${id}-title` }, heading, ...children));
  document.getElementById("sections").append(element("li", {}, element("a", { href: `#${id}` }, title)));
}

// Rows of texts, numbers, or { text, number, differs }; the first cell of each is its heading.
function table(caption, head, rows, tall = false) {
  const cell = (value, place) => {
    const given = value !== null && typeof value === "object" ? value : { text: value, number: typeof value === "number" };
    const text = given.text === null || given.text === undefined ? "–" : typeof given.text === "number" ? figure(given.text) : given.text;
    // An interval may stand below its figure, where a line is short.
    const [figures, interval] = given.number ? text.split(/ (?=\[)/) : [text];
    const parts = interval ? [`${figures} `, element("span", { class: "interval" }, interval)] : [figures];
    const made = element(place ? "td" : "th", place ? {} : { scope: "row" }, ...parts);
    if (given.number) made.classList.add("number");
    if (given.differs) made.classList.add("differs");
    return made;
  };
  const numeric = (place) => place && rows.some((row) => typeof row[place] === "number" || row[place]?.number);
  const headings = head.map((text, place) => element("th", { scope: "col", class: numeric(place) ? "number" : "" }, text));
  const body = rows.map((row) => element("tr", {}, ...row.map(cell)));
  const made = element("table", {}, element("caption", {}, caption), element("thead", {}, element("tr", {}, ...headings)),
    element("tbody", {}, ...body));
  return element("div", { class: tall ? "scroll tall" : "scroll", tabindex: 0, role: "region", "aria-label": caption }, made);
}

// What stands between backticks as code.
const coded = (text) => element("span", {}, ...text.split("`").map((part, place) => (place % 2 ? element("code", {}, part) : part)));
const details = (title, ...children) => element("details", {}, element("summary", {}, title), ...children);
const note = (text) => element("p", { class: "note" }, text);

function choice(label, options, changed) {
  const select = element("select", {}, ...options.map(([value, text]) => element("option", { value }, text)));
  select.addEventListener("change", changed);
  return { select, label: element("label", {}, label, select) };
}

function tick(label, checked, changed) {
  const box = element("input", { type: "checkbox" });
  box.checked = checked;
  box.addEventListener("change", changed);
  return { box, label: element("label", {}, box, label) };
}

// --- numbers -------------------------------------------------------------------------------------------------------------

const UNITS = { B: (value) => scaled(value, ["B", "kB", "MB", "GB", "TB"]), s: duration, "%": (value) => `${figure(value)} %` };

function figure(value) {
  if (value === null || value === undefined) return "–";
  return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function scaled(value, units) {
  const step = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(value || 1) / 3)));
  return `${Number((value / 1000 ** step).toPrecision(3))} ${units[step]}`;
}

function duration(seconds) {
  if (seconds < 120) return `${Number(seconds.toPrecision(3))} s`;
  return seconds < 7200 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function shown(value, unit) {
  if (value === null || value === undefined) return "–";
  if (Array.isArray(value)) return `${shown(value[0], unit)} [${shown(value[1], unit)}, ${shown(value[2], unit)}]`;
  return (UNITS[unit] || figure)(value);
}

const plain = (value) => (Array.isArray(value) ? value[0] : value);
const unique = (values) => [...new Set(values)];
const mean = (values) => {
  const there = values.filter((value) => typeof value === "number");
  return there.length ? there.reduce((sum, value) => sum + value, 0) / there.length : null;
};

// What distinguishes blocks: the part of their names behind what all of them begin with.
function shortNames(names) {
  const first = names[0] || "";
  let length = 0;
  while (names.every((name) => name[length] === first[length]) && length < first.length) length += 1;
  const cut = first.lastIndexOf(".", length - 1) + 1;
  return new Map(names.map((name) => [name, names.length > 1 ? name.slice(cut) : name]));
}

// --- charts --------------------------------------------------------------------------------------------------------------

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const palette = () => color("--series").split(" ");
const axis = (name, more) => ({
  name, nameLocation: "middle", nameGap: 30, nameTextStyle: { color: color("--faint") },
  axisLabel: { color: color("--faint"), hideOverlap: true }, axisLine: { lineStyle: { color: color("--line") } },
  splitLine: { lineStyle: { color: color("--line"), opacity: 0.5 } }, ...more,
});

// A chart whose options are made anew for each theme, width and choice.
function chart(label, options, height) {
  const box = element("div", { class: "chart", "aria-label": label });
  const drawn = { box, draw: () => {
    if (height) box.style.height = `${height()}px`;
    const given = options(box.clientWidth);
    drawn.instance ??= echarts.init(box, null, { renderer: "svg" });
    drawn.instance.resize();
    drawn.instance.setOption({
      animation: false, color: palette(), textStyle: { color: color("--ink"), fontFamily: "system-ui, sans-serif" },
      aria: { enabled: true, label: { description: label } }, ...given,
      tooltip: { confine: true, backgroundColor: color("--paper"), borderColor: color("--line"),
        textStyle: { color: color("--ink"), fontSize: 13 }, ...given.tooltip },
      legend: given.legend && { type: "scroll", top: 0, textStyle: { color: color("--ink") }, pageTextStyle: { color: color("--ink") },
        pageIconColor: color("--link"), ...given.legend },
    }, true);
  } };
  charts.push(drawn);
  return drawn;
}

// Lines of a tooltip, as text.
const lines = (...texts) => {
  const made = element("div", {});
  texts.forEach((text) => made.append(element("div", {}, text)));
  return made;
};

// --- theme ---------------------------------------------------------------------------------------------------------------

// Draws the parts of a page in their order.
function draw(...parts) {
  const button = document.getElementById("theme");
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  function themed(dark) {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(dark));
    charts.forEach((one) => one.draw());
  }
  button.addEventListener("click", () => themed(document.documentElement.dataset.theme !== "dark"));
  preferred.addEventListener("change", (event) => themed(event.matches));
  document.documentElement.dataset.theme = preferred.matches ? "dark" : "light";

  parts.forEach((part) => part());
  themed(preferred.matches);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) charts.forEach((one) => one.draw()); // a phone's bars change the height alone
    width = innerWidth;
  });
}
