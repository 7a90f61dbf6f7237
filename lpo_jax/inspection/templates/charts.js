// Charts: drawn when they come into view, again when the colours of the page change, and all before printing.
const DASHES = ["solid", "dot", "dash", "dashdot"];

// Plotly reads some markup in names.
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function faded(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}

function traces(chart) {
  const several = DATA.runs.length > 1 && !chart.of;
  const found = [];
  chart.series.forEach((series, index) => {
    const own = several ? color("run-" + series.run) : color(series.tone || "run-" + (index % 6));
    const name = plain(several ? `${DATA.runs[series.run].name}: ${series.name}` : series.name);
    const within = chart.series.filter((other, i) => i < index && other.run === series.run).length;
    const meta = { run: series.run };
    if (chart.kind === "bar") {
      found.push({ type: "bar", x: series.x, y: series.y, name, meta, marker: { color: faded(color(index ? "policy" : "target"), 0.75) } });
      return;
    }
    if (chart.kind === "area") {
      found.push({ x: series.x, y: series.y, name, meta, stackgroup: "one", mode: series.x.length < 2 ? "lines+markers" : "lines", line: { width: 0.5, color: own }, fillcolor: faded(own, 0.8) });
      return;
    }
    if (series.low && series.high) {
      const band = { x: series.x, hoverinfo: "skip", showlegend: false, mode: "lines", line: { width: 0, color: own }, meta };
      found.push({ ...band, y: series.low }, { ...band, y: series.high, fill: "tonexty", fillcolor: faded(own, 0.15) });
    }
    found.push({
      x: series.x, y: series.y, name, meta,
      mode: series.markers ? "lines+markers" : "lines",
      line: { color: own, width: 2, dash: several ? DASHES[within % 4] : "solid" },
      marker: { size: 6 },
    });
  });
  return found;
}

function layout(chart) {
  const axis = { gridcolor: color("line"), zeroline: false, linecolor: color("line"), automargin: true };
  const named = traces(chart).filter((trace) => trace.showlegend !== false).length;
  return {
    margin: { l: 44, r: 10, t: named > 1 ? 30 : 10, b: 30 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("dim"), size: 11 },
    hovermode: chart.kind === "bar" ? "closest" : "x unified",
    hoverlabel: { bgcolor: color("card"), font: { color: color("ink") } },
    barmode: "group",
    xaxis: { ...axis, ...(chart.kind === "bar" ? {} : { tickformat: "d" }) },
    yaxis: { ...axis, type: chart.log ? "log" : "linear", rangemode: chart.share || chart.kind !== "line" ? "tozero" : "normal", ...(chart.share ? { tickformat: ".0%" } : {}) },
    showlegend: named > 1,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 }, traceorder: "normal" },
  };
}

function draw(frame) {
  const chart = frame.chart;
  frame.drawn = true;
  Plotly.react(frame, traces(chart), layout(chart), { displayModeBar: false, responsive: true });
  if (frame.wired || chart.kind === "bar") return;
  frame.wired = true;
  frame.on("plotly_click", (event) => openStep(event.points[0].data.meta.run, event.points[0].x));
}

// The groups of a step; of the next step that has some, if it is one before training.
function openStep(run, step) {
  const steps = DATA.runs[run].steps;
  const found = steps.find((other) => other >= step) ?? steps[steps.length - 1];
  if (found !== undefined) location.hash = `step/${run}/${found}`;
}

function placeCharts() {
  const queue = [];
  const pump = () => {  // one chart at a time, so that the page answers meanwhile
    const next = queue.shift();
    if (next && !next.drawn) draw(next);
    if (queue.length) setTimeout(pump);
  };
  const watcher = new IntersectionObserver((entries) => {
    const idle = !queue.length;
    queue.push(...entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target));
    if (idle && queue.length) setTimeout(pump);
  }, { rootMargin: "200px" });
  const frames = [];
  for (const chart of DATA.charts) {
    const home = document.querySelector(`[data-section="${chart.section}"] .charts`);
    const frame = el("div", { class: "plot", id: chart.id });
    frame.chart = chart;
    const title = chart.of && DATA.runs.length > 1 ? `${chart.title} · ${chart.of}` : chart.title;
    home.append(el("div", { class: "chart" }, el("h3", {}, title), el("div", { class: "unit" }, chart.unit), frame));
    watcher.observe(frame);
    frames.push(frame);
  }
  for (const section of document.querySelectorAll("[data-section]")) {
    const empty = !section.querySelector(".chart");
    if (empty) section.querySelector(".charts").append(el("p", { class: "dim" }, "The run recorded no such metrics."));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => frames.filter((f) => f.drawn).forEach(draw));
  addEventListener("beforeprint", () => frames.forEach(draw));
}
