"use strict";
// Draws the page of a sweep from the data in it.
{
  const { points, quality, time, keys } = JSON.parse(document.getElementById("data").textContent);
  const share = (value) => `${figure(100 * value)} %`;
  const MEASURES = [
    ["perplexity_after", "perplexity"], ["agreement", "top-1 agreement"], ["loss", "mean loss"], ["size_after_bytes", "size", "B"],
    ["factor_overhead", "factors", share], ["seconds", "time", "s"], ["cpu_seconds", "CPU time", "s"],
    ["peak_anonymous_memory_bytes", "peak memory", "B"],
  ].filter(([key]) => points.some((point) => typeof point[key] === "number"));
  const named = (key) => MEASURES.find(([name]) => name === key)?.[1] ?? key;
  const said = (key, value) => {
    const unit = MEASURES.find(([name]) => name === key)?.[2];
    return typeof unit === "function" && typeof value === "number" ? unit(value) : shown(value, unit);
  };
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const short = new Map(keys);
  const values = (point, without) => keys.map(([path]) => path).filter((path) => path !== without && path in point.values)
    .map((path) => `${short.get(path)}=${text(point.values[path])}`).join(", ") || "as in the recipe";
  const ran = points.filter((point) => typeof point[quality] === "number");
  const capital = (words) => words[0].toUpperCase() + words.slice(1);
  const axisOf = (key, more) => axis(named(key), { type: "value", scale: true, boundaryGap: ["4%", "4%"], axisLabel: { color: color("--faint"), hideOverlap: true,
    formatter: (value) => said(key, value) }, ...more });

  function table_() {
    const rows = points.map((point) => [
      { text: point.reports ? element("a", { href: `${point.reports}/report.html` }, point.name) : point.name },
      ...MEASURES.map(([key]) => ({ text: said(key, point[key]), number: true })),
      point.status === "done" ? point.front.join(" and ") : point.status,
    ]);
    const dense = unique(points.filter((point) => point.size_before_bytes || point.perplexity_before).map((point) =>
      [point.perplexity_before ? `perplexity ${figure(point.perplexity_before)}` : null, point.size_before_bytes ? shown(point.size_before_bytes, "B") : null]
        .filter((part) => part).join(", ")));
    const errors = points.filter((point) => point.error).map((point) => note(`${point.name}: ${point.status}: ${point.error}`));
    const resumed = points.filter((point) => point.resumed).map((point) => note(`${point.name} went on from a journal: its time is of its last process.`));
    section("points", "Points", table("Figures of each point; its name leads to its report", ["point", ...MEASURES.map(([, name]) => name), "best at"], rows),
      note(`Best at size or time: no other point has no more ${named(quality)} and size (or ${named(time)}), and less of one.`),
      dense.length ? note(`Dense: ${dense.join("; ")}.`) : null, ...errors, ...resumed,
      details("What was varied", table("Values by keys of the recipe", ["point", ...keys.map(([path]) => path)],
        points.map((point) => [point.name, ...keys.map(([path]) => (path in point.values ? text(point.values[path]) : null))]))));
  }

  // Quality against a cost: points on the front are joined.
  function front(id, cost) {
    const title = `${capital(named(quality))} against ${named(cost)}`;
    const at = (chosen) => ran.filter(chosen).sort((a, b) => a[cost] - b[cost]).map((point) => ({ value: [point[cost], point[quality]], point }));
    const groups = [
      ["best", at((point) => point.front.includes(id)), { symbolSize: 11 }, 0],
      ["others", at((point) => point.status === "done" && !point.front.includes(id)), { symbolSize: 9, lineStyle: { width: 0 } }, 5],
      ["rejected", at((point) => point.status === "rejected"), { symbolSize: 10, symbol: "triangle", lineStyle: { width: 0 } }, 1],
    ];
    if (cost === "size_after_bytes" && quality === "perplexity_after") {
      const dense = new Map(ran.filter((point) => point.size_before_bytes).map((point) => [`${point.size_before_bytes} ${point.perplexity_before}`, point]));
      groups.push(["dense", [...dense.values()].map((point) => ({ value: [point.size_before_bytes, point.perplexity_before], point: { name: "dense" } })),
        { symbolSize: 12, symbol: "diamond", lineStyle: { width: 0 } }, 3]);
    }
    const there = groups.filter(([, data]) => data.length);
    if (!there.length) return section(id, title, note("No point has come to its end yet."));
    const drawn = chart(title, () => ({
      grid: { left: 70, right: 24, top: 40, bottom: 48 },
      legend: { data: there.map(([name]) => name) },
      xAxis: axisOf(cost), yAxis: axisOf(quality, { nameGap: 52 }),
      tooltip: { trigger: "item", formatter: ({ value, data }) => lines(data.point.name, `${named(quality)}: ${said(quality, value[1])}`, `${named(cost)}: ${said(cost, value[0])}`) },
      series: there.map(([name, data, more, place]) => ({ type: "line", name, data, symbol: "circle", showAllSymbol: true, color: palette()[place], ...more })),
    }));
    section(id, title, drawn.box);
  }

  function varied() {
    const paths = keys.filter(([path]) => unique(ran.filter((point) => path in point.values).map((point) => text(point.values[path]))).length > 1);
    if (!paths.length) return;
    const redraw = () => drawn.draw();
    const by = choice("By", paths, redraw);
    const measure = choice("Shown", MEASURES.map(([key, name]) => [key, name]), redraw);
    const log = tick("log scale", false, redraw);
    const drawn = chart("A figure by what was varied", () => {
      const [path, key] = [by.select.value, measure.select.value];
      const found = ran.filter((point) => path in point.values && typeof point[key] === "number");
      const numeric = found.every((point) => typeof point.values[path] === "number");
      const groups = unique(found.map((point) => values(point, path)));
      const x = (point) => (numeric ? point.values[path] : text(point.values[path]));
      return {
        grid: { left: 70, right: 24, top: 40, bottom: 48 },
        legend: groups.length > 1 ? { data: groups } : undefined,
        xAxis: axis(short.get(path), numeric ? { type: log.box.checked && found.every((point) => x(point) > 0) ? "log" : "value", scale: true } : { type: "category", data: unique(found.map(x)) }),
        yAxis: axisOf(key, { nameGap: 52 }),
        tooltip: { trigger: "item", formatter: ({ value, data }) => lines(data.point.name, `${named(key)}: ${said(key, value[1])}`) },
        series: groups.map((group) => ({ type: "line", name: group, symbol: "circle", symbolSize: 8, showAllSymbol: true,
          data: found.filter((point) => values(point, path) === group).sort((a, b) => (numeric ? x(a) - x(b) : 0)).map((point) => ({ value: [x(point), point[key]], point })) })),
      };
    });
    section("varied", "By what was varied", element("div", { class: "controls" }, by.label, measure.label, log.label), drawn.box);
  }

  draw(table_, () => front("size", "size_after_bytes"), () => front("time", time), varied);
}
