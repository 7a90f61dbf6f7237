// The pages below the overview: a step, a group, a prompt across steps; and the search.
const DETAIL = document.getElementById("detail");

function crumbs(run, parts, ...end) {
  const name = DATA.runs.length > 1 ? DATA.runs[run].name + " " : "";
  return el("div", { class: "crumbs" }, el("a", { href: "#" }, "← overview"), name, ...parts.flatMap((part) => ["›", part]), el("span", { class: "end" }, ...end));
}

function neighbours(list, here, route, what) {
  const at = list.indexOf(here);
  const side = (other, text) => (other === undefined ? null : [link(route(other), text), " "]);
  return [side(list[at - 1], `← ${what} ${list[at - 1]}`), " ", side(list[at + 1], `${what} ${list[at + 1]} →`)].flat().filter(Boolean);
}

function mean(list) {
  const known = list.filter((x) => typeof x === "number");
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : undefined;
}

// The images of a group's prompt; an image whose thumbnail is not in the file is named.
function pictures(run, group) {
  if (!group.i) return null;
  return el("div", { class: "pictures" }, ...group.i.map(([name, caption]) =>
    el("figure", {},
      DATA.runs[run].images[name] ? el("img", { src: DATA.runs[run].images[name], alt: caption }) : null,
      el("figcaption", { class: "dim" }, caption))));
}

async function showStep(run, step) {
  const groups = await groupsOf(run, step);
  const of = DATA.runs[run];
  const at = of.steps.indexOf(step);
  const rows = groups.map((group) => {
    const passed = group.g.filter((r) => r.o === "pass").length;
    const tone = passed === 0 ? "fail" : passed === group.g.length ? "solved" : "mixed";
    const route = ["group", run, step, group.id];
    return el("tr", { "data-href": "#" + route.map(encodeURIComponent).join("/") },
      el("td", {}, link(route, group.id)),
      el("td", {}, el("span", { class: "chip " + tone }, `${passed}/${group.g.length}`)),
      el("td", { class: "number" }, number(mean(group.g.map((r) => r.r)))),
      el("td", { class: "number" }, number(Math.max(...group.g.map((r) => Math.abs(r.c ?? 0))))),
      el("td", { class: "number" }, number(mean(group.g.map((r) => r.n)))),
      el("td", { class: "dim" }, clip(group.q.replace(/\s+/g, " ").slice(-160), 160)));
  });
  const kept = at < 0 ? 0 : of.kept[at], all = at < 0 ? 0 : of.groups[at];
  DETAIL.replaceChildren(
    crumbs(run, [`step ${step}`], ...neighbours(of.steps, step, (other) => ["step", run, other], "step")),
    el("h1", {}, `Step ${step}`),
    el("p", { class: "dim" }, kept < all ? `${kept} of ${all} groups are in this file.` : `${all} groups.`),
    el("div", { class: "scroll card" }, el("table", { class: "group-table" },
      el("thead", {}, el("tr", {}, ...["prompt", "passed", "reward", "largest |c|", "tokens", "end of the prompt"].map((t, i) => el("th", { class: i > 1 && i < 5 ? "number" : null }, t)))),
      el("tbody", {}, ...rows))));
}

async function showGroup(run, step, id, k) {
  const groups = await groupsOf(run, step);
  const group = groups.find((other) => other.id === id);
  const ids = groups.map((other) => other.id);
  const trail = [link(["step", run, step], `step ${step}`), `prompt ${id}`];
  if (!group) {
    DETAIL.replaceChildren(crumbs(run, trail), el("p", {}, "The texts of this group are not in the file: only some prompts of a large run are kept."));
    return;
  }
  const cards = el("div", { class: "responses" }, ...group.g.map((r) => responseCard(r)));
  const seen = (DATA.runs[run].prompts[id] || []).length;
  DETAIL.replaceChildren(
    crumbs(run, trail, ...neighbours(ids, id, (other) => ["group", run, step, other], "prompt")),
    el("div", { class: "group-top" },
      el("div", {},
        el("div", { class: "card", style: "margin-bottom:14px" },
          el("h3", {}, "Prompt ", seen > 1 ? link(["prompt", run, id], `(at ${seen} steps)`) : null),
          pictures(run, group),
          el("div", { class: "prompt text" }, group.q),
          group.y !== undefined ? el("p", { style: "margin:8px 0 0" }, el("b", {}, "Gold answer: "), el("code", {}, group.y)) : null),
        barsTable(group)),
      simplex(group)),
    tintChooser(group, cards),
    cards);
  if (k !== undefined) choose(k);
}

async function showPrompt(run, id) {
  const seen = DATA.runs[run].prompts[id] || [];
  const first = seen.find(([, passed]) => passed);
  const parts = [];
  let shown;
  for (const [step, passed, count] of seen) {
    const group = (await groupsOf(run, step)).find((other) => other.id === id);
    if (!group) continue;
    shown ??= group;
    const best = [...group.g].sort((a, b) => (b.r ?? -Infinity) - (a.r ?? -Infinity))[0];
    parts.push(el("article", { class: "response " + (passed ? "pass" : "wrong") },
      el("header", {}, link(["group", run, step, id], `step ${step}`), `${passed}/${count} passed`, el("span", { class: "dim" }, `mean reward ${number(mean(group.g.map((r) => r.r)))}`)),
      el("div", { class: "dim" }, `best response, #${best.k}, reward ${number(best.r)}`),
      textOf(best)));
  }
  DETAIL.replaceChildren(
    crumbs(run, [`prompt ${id}`]),
    el("h1", {}, `Prompt ${id}`),
    ...[shown && pictures(run, shown)].filter(Boolean),
    el("p", {}, first ? `First solved at step ${first[0]}: ${first[1]} of ${first[2]} responses passed.` : `Not solved at any of its ${seen.length} steps.`),
    el("div", { class: "responses" }, ...parts));
}

const MOST = 200;
let search = 0;

function wanted(form) {
  const value = (name) => form.elements[name]?.value ?? "";
  const bound = (name, fallback) => (value(name) === "" ? fallback : Number(value(name)));
  const text = value("text").toLowerCase();
  const within = (x, low, high) => (low === -Infinity && high === Infinity) || (typeof x === "number" && x >= low && x <= high);
  const [low, high] = [bound("low", -Infinity), bound("high", Infinity)];
  const [short, long] = [bound("short", -Infinity), bound("long", Infinity)];
  return {
    run: Number(value("run") || 0), from: bound("from", -Infinity), to: bound("to", Infinity), order: value("order"),
    accepts: (r, group) => (!value("outcome") || r.o === value("outcome")) && within(r.r, low, high) && within(r.n, short, long)
      && (!text || r.t.toLowerCase().includes(text) || group.q.toLowerCase().includes(text)),
  };
}

async function find(form) {
  const mine = ++search, status = document.getElementById("found"), results = document.getElementById("results");
  const { run, from, to, order, accepts } = wanted(form);
  const rank = { best: (r) => -(r.r ?? -Infinity), worst: (r) => r.r ?? Infinity, push: (r) => -Math.abs(r.c ?? 0) }[order];
  let hits = [], total = 0;
  status.textContent = "searching";
  for (const step of DATA.runs[run].steps.filter((other) => other >= from && other <= to)) {
    for (const group of await groupsOf(run, step))
      for (const r of group.g)
        if (accepts(r, group)) {
          total += 1;
          hits.push([step, group, r]);
        }
    if (mine !== search) return;
    if (rank) hits.sort((a, b) => rank(a[2]) - rank(b[2]));
    hits = hits.slice(0, MOST);
    status.textContent = `step ${step}: ${total} found so far`;
  }
  status.textContent = `${total} responses found` + (total > MOST ? `, ${MOST} shown` : "");
  results.replaceChildren(total ? el("div", { class: "scroll steps" }, el("table", {},
    el("thead", {}, el("tr", {}, ...["step", "prompt", "k", "outcome", "reward", "c", "tokens", "response"].map((t, i) => el("th", { class: [0, 2, 4, 5, 6].includes(i) ? "number" : null }, t)))),
    el("tbody", {}, ...hits.map(([step, group, r]) =>
      el("tr", { "data-href": "#" + ["response", run, step, group.id, r.k].map(encodeURIComponent).join("/") },
        el("td", { class: "number" }, String(step)), el("td", {}, link(["response", run, step, group.id, r.k], group.id)), el("td", { class: "number" }, String(r.k)),
        el("td", {}, outcomeBadge(r)), el("td", { class: "number" }, number(r.r)), el("td", { class: "number" }, number(r.c)), el("td", { class: "number" }, number(r.n)),
        el("td", {}, el("code", {}, clip(r.t, 160)))))))) : "");
}
