"use strict";
// Draws the page of a run, or of several side by side, from the data in it.
{
  const runs = JSON.parse(document.getElementById("data").textContent);
  const several = runs.length > 1;
  const MOST_CURVES = 300;
  const ROW = 18; // pixels of a block on the map

  // --- parts of the page ---------------------------------------------------------------------------------------------------

  const titles = runs.map((run) => run.name);
  const named = (run) => (several ? `${run.name}: ` : "");
  // Runs beside each other, in rows by their first cells.
  const beside = (part, cells) => unique(runs.flatMap((run) => run[part].map((row) => row[0]))).map((key) => {
    const found = runs.map((run) => run[part].find((row) => row[0] === key));
    return [key, ...found.flatMap((row) => cells(row))];
  });

  function summary() {
    const head = several ? ["", ...titles.flatMap((name) => [`${name}: before`, "after", "ratio"])] : ["", "before", "after", "ratio"];
    const rows = beside("summary", (row) => {
      if (!row) return Array(3).fill({ text: null, number: true });
      const [, before, after, unit] = row;
      const ratio = plain(before) && plain(after) !== null ? plain(after) / plain(before) : null;
      return [before, after].map((value) => ({ text: shown(value, unit), number: true })).concat([{ text: ratio === null ? "–" : ratio.toFixed(3), number: true }]);
    });
    const measured = runs.every((run) => run.summary.some(([name]) => !/^(size|weights|mean)/.test(name)));
    section("summary", "Before and after", table("Figures of the dense and of the compressed model", head, rows),
      measured ? null : note("Where nothing stands but sizes and losses, the recipe evaluated nothing."));
  }

  function origin() {
    const marked = (part) => beside(part, (row) => [row ? row[1] : null]).map(([key, ...values]) => [key, ...values.map((text) => ({
      text, differs: several && unique(values).length > 1 }))]);
    const rows = [...marked("origin"), ...marked("keys").filter(([, { differs }]) => differs)];
    const recipes = runs.map((run) => details(`${named(run)}The recipe`, element("pre", { tabindex: 0 }, run.recipe || "not in the folder")));
    section("origin", "Recipe and origin", table("Where the run came from", ["", ...(several ? titles : [""])], rows), ...recipes,
      several ? note("What differs between the runs is marked.") : null);
  }

  function losses() {
    const all = runs.flatMap((run, number) => run.modules.filter((row) => row.curve.length > 1).map((row) => ({ ...row, run: number })));
    if (!all.length) return section("losses", "Loss of each module", note("No module has a recorded loss curve."));
    const blocks = unique(all.map((row) => row.block));
    const kinds = unique(all.map((row) => row.kind));
    const short = shortNames(blocks);
    const said = element("p", { class: "note", "aria-live": "polite" });
    const redraw = () => drawn.draw();
    const run = choice("Run", [["", "all"], ...titles.map((name, number) => [number, name])], redraw);
    const block = choice("Layer", [["", "all"], ...blocks.map((name) => [name, short.get(name)])], redraw);
    const kind = choice("Type", [["", "all"], ...kinds.map((name) => [name, name])], redraw);
    const log = tick("log scale", true, redraw);
    if (several) [block.select.value, kind.select.value] = [blocks[0], kinds[0]];

    const drawn = chart("Relative loss of modules by iteration", () => {
      const asked = all.filter((row) => [[run, String(row.run)], [block, row.block], [kind, row.kind]]
        .every(([{ select }, value]) => !select.value || select.value === value));
      const taken = [...asked].sort((a, b) => b.loss - a.loss).slice(0, MOST_CURVES);
      const groups = several && !run.select.value ? titles : kinds;
      const group = (row) => (groups === titles ? titles[row.run] : row.kind);
      said.textContent = `${taken.length} of ${all.length} curves` +
        (taken.length < asked.length ? `: the ${MOST_CURVES} with the largest losses at the end of ${asked.length}; choose a layer or type to see the others` : "");
      const colors = palette();
      return {
        grid: { left: 62, right: 16, top: 40, bottom: 48 },
        legend: { data: groups.filter((name) => taken.some((row) => group(row) === name)) },
        xAxis: axis("iteration", { type: "value", minInterval: 1 }),
        yAxis: axis("loss relative to Ŵ = 0", { type: log.box.checked ? "log" : "value", nameGap: 46, axisLabel: { color: color("--faint"), hideOverlap: true, formatter: (value) => figure(value) } }),
        tooltip: { trigger: "axis", formatter: (points) => {
          const sorted = [...points].sort((a, b) => b.value[1] - a.value[1]);
          const more = sorted.length > 8 ? [`… and ${sorted.length - 8} more below`] : [];
          return lines(`iteration ${points[0].value[0]}`, ...sorted.slice(0, 8).map((point) => `${taken[point.seriesIndex].label}: ${figure(point.value[1])}`), ...more);
        } },
        series: taken.map((row) => {
          row.label = `${several ? `${titles[row.run]} ` : ""}${short.get(row.block)} ${row.kind}`;
          return { type: "line", name: group(row), showSymbol: false, triggerLineEvent: true, emphasis: { focus: "series" },
            itemStyle: { color: colors[groups.indexOf(group(row)) % colors.length] }, lineStyle: { width: 1.25 },
            data: row.curve.map(([x, y]) => [x, log.box.checked && !(y > 0) ? null : y]) };
        }),
      };
    });
    const rows = all.map((row) => [`${several ? `${titles[row.run]} ` : ""}${row.name}`, row.first, row.loss, row.steps, row.stop]);
    section("losses", "Loss of each module", element("div", { class: "controls" }, ...(several ? [run.label] : []), block.label, kind.label, log.label),
      drawn.box, said, details("As a table", table("Loss at the start and as stored", ["module", "first", "last", "iterations", "ended by"], rows, true)));
  }

  const METRICS = [
    ["loss", "final loss", ""], ["error", "error of the weight", ""], ["overhead", "factor overhead, % of the dense weight", "%"],
    ["masks", "groups with another mask than at the start, %", "%"], ["bytes", "size, % of the dense weight", "%"], ["seconds", "time, s", "s"],
    ["tokens", "calibration tokens", ""], ["retries", "damping retries", ""], ["dead", "dead channels", ""],
  ];

  function map() {
    const numbers = runs.map((_, number) => number).filter((number) => runs[number].modules.length);
    if (!numbers.length) return section("map", "Map of layers and modules", note("The run changed no module by itself."));
    const redraw = () => drawn.draw();
    const run = choice("Run", numbers.map((number) => [number, titles[number]]), redraw);
    const there = METRICS.filter(([key]) => runs.some(({ modules }) => modules.some((row) => typeof row[key] === "number")));
    const metric = choice("Shown", there.map(([key, text]) => [key, text]), redraw);
    const table_ = element("div", {});
    const modules = () => runs[run.select.value || numbers[0]].modules;
    const blocks = () => unique(modules().map((row) => row.block));

    const drawn = chart("Map of layers and modules", (width) => {
      const [key, text, unit] = there.find(([name]) => name === metric.select.value);
      const [rows, kinds] = [blocks(), unique(modules().map((row) => row.kind))];
      const short = shortNames(rows);
      const cells = new Map();
      for (const row of modules()) {
        const place = `${kinds.indexOf(row.kind)},${rows.indexOf(row.block)}`;
        cells.set(place, [...(cells.get(place) || []), row]);
      }
      const data = [...cells].map(([place, found]) => [...place.split(",").map(Number), mean(found.map((row) => row[key]))])
        .filter((cell) => cell[2] !== null);
      const values = data.map((cell) => cell[2]);
      table_.replaceChildren(table(text, ["layer", ...kinds], rows.map((block, y) => [short.get(block),
        ...kinds.map((_, x) => mean((cells.get(`${x},${y}`) || []).map((row) => row[key])))]), true));
      return {
        grid: { left: width < 500 ? 40 : 70, right: 12, top: 8, bottom: 140 },
        xAxis: { ...axis("", { type: "category", data: kinds, splitLine: { show: false } }), axisLabel: { color: color("--faint"), rotate: 45, interval: 0,
          formatter: (name) => name.split(".").pop(), fontSize: 11 } },
        yAxis: axis("", { type: "category", data: rows.map((name) => short.get(name)), inverse: true, splitLine: { show: false } }),
        visualMap: { min: Math.min(...values), max: Math.max(...values), calculable: true, orient: "horizontal", left: "center", bottom: 0, itemWidth: 14,
          itemHeight: Math.min(220, width - 140), inRange: { color: [color("--low"), color("--high")] }, textStyle: { color: color("--faint") }, formatter: (value) => shown(value, unit) },
        tooltip: { formatter: ({ value: [x, y, value] }) => {
          const found = cells.get(`${x},${y}`);
          return lines(found.length > 1 ? `${rows[y]} ${kinds[x]}, mean of ${found.length}` : found[0].name, `${text}: ${shown(value, unit)}`);
        } },
        series: [{ type: "heatmap", data, itemStyle: { borderColor: color("--paper"), borderWidth: 1 } }],
      };
    }, () => 170 + ROW * Math.max(4, blocks().length));
    section("map", "Map of layers and modules", element("div", { class: "controls" }, ...(several ? [run.label] : []), metric.label), drawn.box,
      note("Losses are of a module's outputs, relative to those with a weight of zeros. A cell of several modules (experts) is their mean."),
      details("As a table", table_));
  }

  function depth() {
    const there = runs.map((run, number) => ({ ...run, number })).filter((run) => run.depth.length);
    const notes = runs.filter((run) => !run.depth.length).map((run) => note(`${named(run)}Error along depth: ${run.depth_note}`));
    const parts = [];
    const line = (label, yName, rows, bars) => {
      const blocks = unique(rows.flatMap((run) => run.points.map(([block]) => block)));
      const short = shortNames(blocks);
      const at = (run) => blocks.map((block) => run.points.find(([name]) => name === block)?.[1] ?? null);
      const drawn = chart(label, () => ({
        grid: { left: 62, right: 16, top: 40, bottom: 48 },
        legend: { data: rows.flatMap((run) => (bars ? [run.label, `${run.label}: added by the layer`] : [run.label])) },
        xAxis: axis("layer", { type: "category", data: blocks.map((name) => short.get(name)) }),
        yAxis: axis(yName, { type: "value", nameGap: 46 }),
        tooltip: { trigger: "axis", formatter: (points) => lines(blocks[points[0].dataIndex], ...points.map((point) => `${point.seriesName}: ${figure(point.value)}`)) },
        series: rows.flatMap((run) => {
          const values = at(run);
          const lineOf = { type: "line", name: run.label, data: values, symbolSize: 5 };
          const added = values.map((value, place) => (value === null ? null : value - (place ? values[place - 1] ?? 0 : 0)));
          return bars ? [lineOf, { type: "bar", name: `${run.label}: added by the layer`, data: added, barMaxWidth: 18 }] : [lineOf];
        }),
      }));
      return [drawn.box, details("As a table", table(label, ["layer", ...rows.map((run) => run.label)], blocks.map((block, place) => [block, ...rows.map((run) => at(run)[place])]), true))];
    };
    if (there.length) {
      const rows = there.map((run) => ({ label: several ? run.name : "relative error", points: run.depth.map(([block, error]) => [block, error * 100]) }));
      parts.push(element("h3", {}, "How it accumulates"), ...line("Error of each layer's output on one calibration sample, %", "error, %", rows, !several),
        note("The mean over positions of ‖x − x̂‖ / ‖x‖, x the layer's output in the model that the run started from, x̂ in the compressed one."));
    }
    const of = (label, modules) => ({ label, points: unique(modules.map((row) => row.block))
      .map((block) => [block, mean(modules.filter((row) => row.block === block).map((row) => row.loss))]) });
    const losses = several ? runs.filter((run) => run.modules.length).map((run) => of(run.name, run.modules))
      : unique(runs[0].modules.map((row) => row.kind)).map((kind) => of(kind, runs[0].modules.filter((row) => row.kind === kind)));
    if (losses.length) parts.push(element("h3", {}, "Where it comes from"),
      ...line(`Final loss of the modules of each layer${several ? ", their mean" : ""}`, "final loss", losses, false));
    section("depth", "Error along the depth", ...notes, ...parts);
  }

  function oddities() {
    const parts = runs.flatMap((run) => [
      run.counts.length ? table(`${named(run)}Done out of the ordinary`, ["", "times", "modules"], run.counts)
        : note(`${named(run)}No damping had to be retried, no channel was dead, nothing else was out of the ordinary.`),
      run.experts.length ? table(`${named(run)}Calibration tokens of an expert`, ["layer", "for", "experts", "fewest", "median", "most", "below the minimum"], run.experts) : null,
      run.refinements.length ? table(`${named(run)}Training afterwards`, ["what", "by", "held-out loss before", "best", "steps"], run.refinements, true) : null,
      run.notes.length ? details(`${named(run)}Warnings, and what was left as it was (${run.notes.length})`, element("ul", {}, ...run.notes.map((text) => element("li", {}, text)))) : null,
    ]);
    section("oddities", "What stood out", ...parts);
  }

  function cost() {
    const head = several ? ["", ...titles.flatMap((name) => [`${name}: planned`, "actual"])] : ["", "planned", "actual", "ratio"];
    const rows = beside("cost", (row) => {
      const [, planned, actual, unit] = row || [];
      const cells = [planned, actual].map((value) => ({ text: shown(value, unit), number: true }));
      return several ? cells : [...cells, { text: planned ? (actual / planned).toFixed(2) : "–", number: true }];
    });
    const phases = unique(runs.flatMap((run) => run.phases.map(([name]) => name)));
    const time = (run, phase) => run.phases.find(([name]) => name === phase)?.[1] ?? null;
    const drawn = chart("Seconds of each phase", (width) => ({
      grid: { left: width < 500 ? 104 : 130, right: 16, top: several ? 40 : 8, bottom: 48 },
      legend: several ? { data: titles } : undefined,
      yAxis: axis("", { type: "category", data: phases, inverse: true, splitLine: { show: false } }),
      xAxis: axis("seconds", { type: "value" }),
      tooltip: { trigger: "axis", axisPointer: { type: "shadow" }, formatter: (points) => lines(phases[points[0].dataIndex], ...points.map((point) => `${several ? `${point.seriesName}: ` : ""}${shown(point.value, "s")}`)) },
      series: runs.map((run) => ({ type: "bar", name: run.name, data: phases.map((phase) => time(run, phase)), barMaxWidth: 18 })),
    }), () => 110 + 26 * phases.length * (several ? 1 + runs.length / 3 : 1));
    const tables = runs.map((run) => table(`${named(run)}Phases`, ["phase", "time", "CPU time", "peak memory so far"], run.phases.map(([name, ...values]) =>
      [name, ...values.map((value, place) => ({ text: shown(value, place < 2 ? "s" : "B"), number: true }))])));
    section("cost", "Time and memory", table("What was planned and what it took", head, rows), drawn.box, details("As a table", ...tables));
  }

  function loads() {
    if (!runs.some((run) => run.loads.length)) return;
    const rows = beside("loads", (row) => [row ? { text: coded(`${row[1] ? "yes" : "no"}: ${row[2]}`) } : null])
      .map(([runtime, ...cells]) => [{ text: coded(runtime) }, ...cells]);
    section("loads", "What can load it", table("Runtimes, as far as configuration and names tell", ["", ...(several ? titles : ["loads the folder"])], rows));
  }

  draw(summary, origin, losses, map, depth, oddities, cost, loads);
}
