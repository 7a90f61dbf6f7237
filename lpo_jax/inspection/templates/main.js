// Two runs side by side, routes, and the life of the page.
function prefix(x, y) {
  let length = 0;
  while (length < x.length && length < y.length && x[length] === y[length]) length += 1;
  return length;
}

function pair(common, rest, names) {
  return el("div", { class: "responses" }, ...rest.map((text, i) =>
    el("article", { class: "response" }, el("header", {}, el("b", {}, names[i])),
      el("div", { class: "text" }, el("span", { class: "common" }, common), el("span", { class: "differs" }, text)))));
}

// The same prompt with the same random key under both runs, step by step.
async function showPairs(step) {
  const home = document.getElementById("pairs");
  const [first, second] = DATA.runs;
  const shared = first.steps.filter((other) => second.steps.includes(other));
  if (!shared.length) return;
  step = step ?? DATA.first?.step ?? shared[0];
  const [groups, others] = [await groupsOf(0, step), await groupsOf(1, step)];
  const parts = [];
  for (const group of groups) {
    const other = others.find((candidate) => candidate.id === group.id);
    for (const r of other ? group.g : []) {
      const s = other.g.find((candidate) => candidate.k === r.k);
      if (!s || r.t === s.t || parts.length >= 6) continue;
      const at = prefix(r.t, s.t);
      parts.push(el("div", { class: "card", style: "margin-bottom:14px" },
        el("h3", {}, link(["response", 0, step, group.id, r.k], `prompt ${group.id}, response ${r.k}`), ` · reward ${number(r.r)} and ${number(s.r)}`),
        pair(r.t.slice(0, at), [r.t.slice(at), s.t.slice(at)], [first.name, second.name])));
    }
  }
  home.replaceChildren(
    el("p", { class: "dim" }, "Same prompt, same random key at step ",
      el("select", { onchange: (event) => showPairs(Number(event.target.value)) },
        ...shared.map((other) => el("option", { value: other, selected: other === step }, String(other)))),
      parts.length ? ": what differs is marked." : ": no kept response differs, or the runs drew other prompts."),
    ...parts);
}

async function route() {
  const [view, ...parts] = location.hash.slice(1).split("/").map(decodeURIComponent);
  const views = { step: showStep, group: showGroup, response: showGroup, prompt: showPrompt };
  const overview = document.getElementById("overview");
  const detail = view in views;
  overview.hidden = detail;
  DETAIL.hidden = !detail;
  if (!detail) {
    const target = view && document.getElementById(view);
    if (target) target.scrollIntoView();
    return;
  }
  const run = Number(parts[0]);
  if (!DATA.runs[run]) return;
  scrollTo(0, 0);
  await (view === "prompt" ? showPrompt(run, parts[1]) : views[view](run, Number(parts[1]), parts[2], parts[3] === undefined ? undefined : Number(parts[3])));
}

async function follow(known) {
  const badge = document.getElementById("live");
  badge.hidden = false;
  try {
    const state = await (await fetch("state")).json();
    badge.textContent = state.text;
    if (known !== null && state.version !== known) {
      if (DETAIL.hidden) return location.reload();
      badge.replaceChildren(el("a", { href: "#", onclick: (event) => { event.preventDefault(); location.reload(); } }, `${state.text} · reload`));
    }
    known = known ?? state.version;
  } catch (error) {
    badge.textContent = "the server is gone";
  }
  setTimeout(() => follow(known), 2000);
}

document.addEventListener("click", (event) => {
  const row = event.target.closest("tr[data-href]");
  if (row && !event.target.closest("a")) location.hash = row.dataset.href;
});
document.getElementById("filters").addEventListener("submit", (event) => {
  event.preventDefault();
  find(event.target);
});
addEventListener("hashchange", route);
placeCharts();
if (DATA.first) {
  document.getElementById("first-difference").append(pair(DATA.first.common, DATA.first.rest, DATA.runs.map((run) => run.name)));
}
if (DATA.runs.length === 2) showPairs();
if (DATA.live) follow(null);
route();
document.body.dataset.ready = "yes";
