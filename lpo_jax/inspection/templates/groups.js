// The group page: why each of the K responses was pushed.
const TINTS = {
  tl: ["log-prob", (x) => Math.min(1, -x / 6)],
  te: ["entropy", (x) => Math.min(1, x / 3)],
  tr: ["ratio to the behaviour policy", (x) => Math.min(1, Math.abs(Math.log(Math.max(x, 1e-6))))],
  tg: ["gate", (x) => (x ? 0 : 0.8)],
};

function outcomeBadge(response) {
  const outcome = response.o || "not judged";
  return el("span", { class: "badge " + outcome }, outcome);
}

function bar(kind, share, from = 0) {
  const width = Math.max(0, Math.min(1, share)) * 100;
  return el("span", { class: "bar" }, el("i", { class: kind, style: `left:${from * 100}%;width:${width}%` }));
}

// c > 0 lowers the response's score, c < 0 raises it: the bar points the way the response is pushed.
function push(c, largest) {
  if (c === undefined) return el("span", { class: "bar" });
  const size = (Math.abs(c) / (largest || 1)) / 2;
  return c < 0 ? bar("up", size, 0.5) : bar("down", size, 0.5 - size);
}

function barsTable(group) {
  const of = (key) => group.g.map((r) => r[key] ?? 0);
  const most = Math.max(...of("w"), ...of("p"), 1e-9);
  const largest = Math.max(...of("c").map(Math.abs));
  const rows = group.g.map((r) =>
    el("tr", {},
      el("td", { class: "number" }, el("a", { href: "#", onclick: (event) => { event.preventDefault(); choose(r.k); } }, String(r.k))),
      el("td", {}, outcomeBadge(r)),
      el("td", { class: "number" }, number(r.r)),
      el("td", {}, bar("w", (r.w ?? 0) / most), bar("p", (r.p ?? 0) / most)),
      el("td", { class: "number" }, `${number(r.w)}`, el("br"), `${number(r.p)}`),
      el("td", {}, push(r.c, largest)),
      el("td", { class: "number" }, number(r.c)),
    ));
  return el("div", { class: "card" },
    el("div", { class: "legend" },
      el("span", {}, el("i", { style: "background:var(--target)" }), "target w*"),
      el("span", {}, el("i", { style: "background:var(--policy)" }), "policy P"),
      el("span", {}, el("i", { style: "background:var(--up)" }), "pushed up (c < 0)"),
      el("span", {}, el("i", { style: "background:var(--down)" }), "pushed down (c > 0)")),
    el("div", { class: "scroll" }, el("table", { class: "bars" },
      el("thead", {}, el("tr", {}, ...["k", "outcome", "reward", "w* and P", "", "push", "c"].map((t, i) => el("th", { class: [0, 2, 6].includes(i) ? "number" : null }, t)))),
      el("tbody", {}, ...rows))));
}

const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
const minus = (x, y) => x.map((value, i) => value - y[i]);
const scale = (x, s) => x.map((value) => value * s);

// An orthonormal basis of the space through uniform, w* and P: a plane, a line, or empty where all three are equal.
function basis(target, policy, K) {
  const uniform = Array(K).fill(1 / K);
  const found = [];
  for (const vector of [minus(target, uniform), minus(policy, uniform)]) {
    let rest = vector;
    for (const axis of found) rest = minus(rest, scale(axis, dot(rest, axis)));
    const size = Math.sqrt(dot(rest, rest));
    if (size > 1e-4) found.push(scale(rest, 1 / size));
  }
  return found;
}

// Where each corner is drawn.
function plane(axes, K) {
  if (K === 3) return [[0, 0.8165], [-0.7071, -0.4082], [0.7071, -0.4082]];  // the triangle itself
  const [x, y] = axes;
  return Array.from({ length: K }, (_, k) => [x[k], y ? y[k] : 0]);
}

function hull(points) {
  const sorted = [...points].sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const cross = (o, a, b) => (a[0] - o[0]) * (b[1] - o[1]) - (a[1] - o[1]) * (b[0] - o[0]);
  const half = (list) => list.reduce((kept, p) => {
    while (kept.length > 1 && cross(kept[kept.length - 2], kept[kept.length - 1], p) <= 0) kept.pop();
    return [...kept, p];
  }, []).slice(0, -1);
  return [...half(sorted), ...half(sorted.reverse())];
}

function simplex(group) {
  const valid = group.g.filter((r) => r.v !== false && r.w !== undefined && r.p !== undefined);
  const K = valid.length;
  if (K < 2) return el("div", { class: "card" }, el("h3", {}, "On the simplex"), el("p", { class: "dim" }, "Not recorded, or fewer than two responses are in the group."));
  const target = valid.map((r) => r.w), policy = valid.map((r) => r.p);
  const axes = basis(target, policy, K);
  if (!axes.length && K !== 3) return el("div", { class: "card" }, el("h3", {}, "On the simplex"), el("p", { class: "dim" }, "w* and P are uniform: this group gives no signal."));
  const line = K !== 3 && axes.length === 1;
  const corners = plane(axes, K);
  const at = (p) => p.reduce(([x, y], share, k) => [x + share * corners[k][0], y + share * corners[k][1]], [0, 0]);
  const points = [...corners, at(target), at(policy), [0, 0]];
  const [low, high] = [0, 1].map((axis) => points.map((p) => p[axis])).map((v) => [Math.min(...v), Math.max(...v)]);
  const unit = 260 / Math.max(low[1] - low[0], high[1] - high[0], 1e-6);
  const middle = [(low[0] + low[1]) / 2, (high[0] + high[1]) / 2];
  const screen = ([x, y]) => [180 + (x - middle[0]) * unit, 150 - (y - middle[1]) * unit];
  const path = (list) => list.map(screen).map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
  const mark = (p, size, attributes, label, dx = 9, dy = 4) => {
    const [x, y] = screen(p);
    const at = line ? { x, y: y + (dy > 0 ? 24 : -14), "text-anchor": "middle" } : { x: x + dx, y: y + dy };
    return [el("svg:circle", { cx: x, cy: y, r: size, ...attributes }), label ? el("svg:text", at, label) : null];
  };
  const tones = { pass: "var(--good)", wrong: "var(--bad)", malformed: "var(--warn)" };
  const seats = new Map();  // corners that fall together share a label
  valid.forEach((r, k) => {
    const key = corners[k].map((x) => x.toFixed(2)).join();
    seats.set(key, [...(seats.get(key) || []), [r, k]]);
  });
  const labels = [...seats.values()].map((all) => {
    const [r, k] = all[0];
    const names = all.map(([response]) => response.k);
    const name = names.length > 3 ? `${names[0]}…${names[names.length - 1]} (${names.length})` : names.join(", ");
    const [x] = screen(corners[k]);
    return mark(corners[k], 4.5, { fill: tones[r.o] || "var(--dim)" }, name, x > 180 ? -10 - 6 * name.length : 9, 4);
  });
  const [px, py] = screen(at(policy)), [wx, wy] = screen(at(target));
  const drawing = el("svg:svg", { class: "simplex", viewBox: line ? "-20 90 400 120" : "-20 0 400 300", role: "img", "aria-label": "the group on the simplex of its responses" },
    el("svg:polygon", { class: "edge", points: path(hull(corners)) }),
    ...labels.flat(),
    el("svg:line", { x1: px, y1: py, x2: wx, y2: wy, stroke: "var(--policy)", "stroke-width": 2, "stroke-dasharray": "4 3" }),
    ...mark([0, 0], 4, { fill: "none", stroke: "var(--dim)", "stroke-width": 1.5 }, ""),
    ...mark(at(target), 7, { fill: "var(--target)" }, "w*", 9, -6),
    ...mark(at(policy), 6, { fill: "var(--policy)" }, "P", 8, line ? -6 : 14));
  const tv = (p, q) => p.reduce((sum, x, k) => sum + Math.abs(x - q[k]), 0) / 2;
  const uniform = Array(K).fill(1 / K);
  return el("div", { class: "card" }, el("h3", {}, "On the simplex"), drawing,
    el("p", { class: "dim" }, `Total variation: P to w* ${number(tv(policy, target))}, P to uniform ${number(tv(policy, uniform))}, w* to uniform ${number(tv(target, uniform))}. `,
      K === 3
        ? "The triangle of the three responses; the ring is uniform."
        : `The simplex of ${K} responses is projected onto the ${line ? "line" : "plane"} through uniform (ring), w* and P. Distances between these three are exact; corners of responses with equal w* and P fall together.`));
}

function textOf(response, tint) {
  const values = response[tint];
  if (!tint || !values || !response.tt) return el("div", { class: "text" }, response.t || "(empty response)");
  const strength = TINTS[tint][1];
  return el("div", { class: "text" }, ...response.tt.map((token, i) =>
    el("span", {
      class: "token" + (tint === "tg" && !values[i] ? " shut" : ""),
      title: `${TINTS[tint][0]} ${number(values[i])}`,
      style: values[i] === null ? null : `background:color-mix(in srgb, var(--policy) ${Math.round(60 * strength(values[i]))}%, transparent)`,
    }, token)));
}

function responseCard(r, tint) {
  const facts = [
    ["reward", r.r], ["shaped", r.s], ["advantage", r.a], ["w*", r.w], ["P", r.p], ["c", r.c],
    ["tokens", r.n], ["log-prob", r.l], ["entropy", r.e], ["sampled at step", r.b],
    ...Object.entries(r.x || {}),
  ].filter(([, value]) => value !== undefined && value !== null);
  return el("article", { class: "response " + (r.o || ""), id: "response-" + r.k },
    el("header", {}, el("b", {}, "#" + r.k), outcomeBadge(r),
      r.v === false ? el("span", { class: "badge" }, "masked") : null,
      r.f === false ? el("span", { class: "badge" }, "cut at the limit") : null,
      r.c ? el("span", { class: "dim" }, r.c < 0 ? "pushed up" : "pushed down") : null),
    textOf(r, tint),
    el("dl", {}, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, number(value, 4))))));
}

function choose(k) {
  document.querySelectorAll(".response.chosen").forEach((node) => node.classList.remove("chosen"));
  const node = document.getElementById("response-" + k);
  if (!node) return;
  node.classList.add("chosen");
  node.scrollIntoView({ block: "center" });
}

function tintChooser(group, cards) {
  const tints = Object.keys(TINTS).filter((key) => group.g.some((r) => r[key] && r.tt));
  if (!tints.length) return el("p", { class: "dim" }, "The run recorded no statistics of the tokens of this group.");
  const redraw = (tint) => cards.replaceChildren(...group.g.map((r) => responseCard(r, tint)));
  return el("p", { class: "dim" }, "Tint tokens by ",
    el("select", { id: "tint", onchange: (event) => redraw(event.target.value) },
      el("option", { value: "" }, "nothing"), ...tints.map((key) => el("option", { value: key }, TINTS[key][0]))));
}
