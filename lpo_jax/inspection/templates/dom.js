"use strict";
// Elements and numbers. Text enters the page as text nodes only, never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);

function el(tag, attributes, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(digits)));
}

function link(route, ...children) {
  return el("a", { href: "#" + route.map(encodeURIComponent).join("/") }, ...children);
}

function clip(text, length) {
  return text.length > length ? text.slice(0, length) + "…" : text;
}

const CHUNKS = new Map();

// The kept groups of a step: base64 of gzip of JSON, unpacked when first needed.
function groupsOf(run, step) {
  const key = run + "-" + step;
  if (!CHUNKS.has(key)) CHUNKS.set(key, unpack("chunk-" + key));
  return CHUNKS.get(key);
}

async function unpack(id) {
  const node = document.getElementById(id);
  if (!node) return [];
  const binary = atob(node.textContent);
  const bytes = Uint8Array.from(binary, (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
