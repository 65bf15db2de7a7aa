/** The fork tree over time: which VM or snapshot is a copy of which, also of those that are gone. */
import { useEffect, useRef, useState } from "preact/hooks";
import { client, may, named, onEvent, revision, seesAll, vms } from "../store.js";
import { path } from "../api.js";
import { Empty, FormDialog, Problem, Said, Time, ask, clean, html, notify, route, to, toVm } from "../ui.js";
import { askCreateFrom, possible, run } from "../actions.js";

const LANE = 32;
const PAGE = 1000;
const PAGES = 5;
const SOON_MS = 300;
const CHANGES = new Set(["VM_CREATED", "VM_DELETED", "VM_FORKED", "VM_RESTORED", "SNAPSHOT_TAKEN", "SNAPSHOT_DELETED"]);
const MARGIN = 12;
const TICK = 92;

async function read() {
  const nodes = [];
  const edges = [];
  let cursor;
  for (let page = 0; page < PAGES; page++) {
    const found = await client.get("api/v1/forks", { query: { limit: PAGE, cursor, project: seesAll.value ? "*" : undefined } });
    nodes.push(...found.nodes);
    edges.push(...found.edges);
    cursor = found.next_cursor;
    if (!cursor) break;
  }
  return { nodes, edges, more: Boolean(cursor) };
}

/** Returns a VM as it is now; undefined: it is gone, or the node is a snapshot. */
const vmOf = (node) => (node.kind === "vm" ? vms.get(Number(node.id.slice(3))) : undefined);

/** Returns the nodes in the order of a tree, each with its depth, its lane and the edge that leads to it. */
function arrange({ nodes, edges }, only) {
  const byId = new Map(nodes.map((node) => [node.id, { ...node, status: vmOf(node)?.status ?? node.status, copies: [], edge: null }]));
  for (const edge of edges) {
    const [source, target] = [byId.get(edge.source), byId.get(edge.target)];
    if (!target) continue;
    target.edge = edge;
    if (source) source.copies.push(target);
  }
  const roots = [...byId.values()].filter((node) => !node.edge || !byId.has(node.edge.source));
  const rows = [];
  const place = (node, depth) => {
    // Without recursion over what others have made: trees may be deep.
    const left = [[node, depth]];
    while (left.length) {
      const [one, at] = left.pop();
      rows.push(Object.assign(one, { depth: at, lane: rows.length }));
      for (const copy of one.copies.toReversed()) left.push([copy, at + 1]);
    }
  };
  const contains = (node) => {
    const left = [node];
    while (left.length) {
      const one = left.pop();
      if (one.id === only) return true;
      left.push(...one.copies);
    }
    return false;
  };
  for (const root of roots) if (!only || contains(root)) place(root, 0);
  return rows;
}

export function Forks() {
  const { of } = route.value.query;
  const [found, setFound] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    let over = false;
    let timer;
    const again = () => read().then((tree) => { if (!over) { setFound(tree); setProblem(null); } }, (error) => { if (!over) setProblem(error); });
    again();
    const end = onEvent((event) => {
      if (!CHANGES.has(event.type)) return;
      clearTimeout(timer);
      timer = setTimeout(again, SOON_MS);
    });
    return () => { over = true; clearTimeout(timer); end(); };
  }, []);
  revision.value;
  const rows = found ? arrange(found, of) : [];
  return html`<main class="main"><div class="head"><h1>Forks and snapshots</h1><span class="quiet num">${rows.length || ""}</span>
      ${of && html`<a class="button" href=${to("forks")}>Show all</a>`}</div>
    <${Problem} of=${problem}/>
    ${!found && !problem && html`<p class="quiet" role="status">Reading…</p>`}
    ${found?.more && html`<div class="note">There are more than are shown here: those that were made first.</div>`}
    ${found && !rows.length && html`<${Empty} title="No copies yet"><p>A VM can be forked while it runs. Each copy continues from that moment, with the same
      memory and the same processes: prepare once, then try many ways at the same time. A snapshot keeps the moment for later.</p>
      <div class="code"><pre>volar vms fork demo --count 3${"\n"}volar vms snapshot demo</pre></div><//>`}
    ${rows.length > 0 && html`<${Lanes} rows=${rows} of=${of}/>`}</main>`;
}

/**
 * Returns where times are on an axis of a width. What happens within seconds and what happens after days has to be
 * seen at once, so a distance grows with the logarithm of the time in it.
 */
function timeAxis(times, now, width) {
  const points = [...new Set(times.filter(Number.isFinite).map((time) => Math.floor(time / 100) * 100)), now].sort((one, other) => one - other);
  const sums = [0];
  for (let index = 1; index < points.length; index++) sums.push(sums.at(-1) + 1 + Math.log2(1 + (points[index] - points[index - 1]) / 1000));
  const scale = width / (sums.at(-1) || 1);
  const at = (time) => {
    let [low, high] = [0, points.length - 1];
    while (low < high) {
      const between = (low + high + 1) >> 1;
      if (points[between] <= time) low = between; else high = between - 1;
    }
    const gap = points[low + 1] - points[low];
    const part = gap ? Math.min(1, Math.max(0, (time - points[low]) / gap)) : 0;
    return scale * (sums[low] + part * ((sums[low + 1] ?? sums[low]) - sums[low]));
  };
  const ticks = [];
  for (const point of points) {
    const place = at(point);
    if ((!ticks.length || place - ticks.at(-1)[1] > TICK) && width - place > TICK) ticks.push([point, place]);
  }
  return { at, ticks };
}

function Lanes({ rows, of }) {
  const box = useRef(null);
  const [width, setWidth] = useState(400);
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    const sizes = new ResizeObserver(() => setWidth(box.current?.clientWidth ?? 400));
    sizes.observe(box.current);
    const timer = setInterval(() => { if (!document.hidden) setNow(Date.now()); }, 2000);
    return () => { sizes.disconnect(); clearInterval(timer); };
  }, []);
  const began = (node) => Date.parse(node.created_at ?? node.edge?.at ?? NaN);
  const axis = timeAxis(rows.flatMap((node) => [began(node), Date.parse(node.deleted_at ?? NaN), Date.parse(node.edge?.at ?? NaN)]), now, width - 2 * MARGIN);
  const x = (time) => MARGIN + axis.at(time);
  const lanes = new Map(rows.map((node) => [node.id, node]));
  const start = (node) => (Number.isFinite(began(node)) ? x(began(node)) : MARGIN / 2);
  const end = (node) => (node.status !== null ? width - MARGIN : node.deleted_at ? Math.max(start(node) + 4, x(Date.parse(node.deleted_at))) : start(node) + MARGIN);
  const middle = (node) => node.lane * LANE + LANE / 2;
  return html`<div class="lanes">
    <div class="names" role="table" aria-label="Forks and snapshots">${rows.map((node) => html`<div class=${`lane ${node.id === of ? "here" : ""}`} role="row" key=${node.id}>
      <span class="who" role="cell" style=${`padding-left: ${Math.min(node.depth, 12) * 14}px`}><span class=${`state ${state(node)}`}>${name(node)}</span></span>
      <span class="does" role="cell"><${Actions} node=${node}/></span>
      <span class="took quiet num" role="cell" title="How long its source was paused for it">${paused(node)}</span></div>`)}
      <div class="below quiet" role="row"><span role="cell">source paused for</span></div></div>
    <div class="times" ref=${box}><svg width=${width} height=${rows.length * LANE} role="img" aria-label="When each was made and deleted">
      ${axis.ticks.map(([, place]) => html`<line class="tick" x1=${MARGIN + place} x2=${MARGIN + place} y1="0" y2=${rows.length * LANE}/>`)}
      ${rows.map((node) => html`<g key=${node.id} class=${`life ${state(node)} ${node.kind}`}>
        <line x1=${start(node)} x2=${end(node)} y1=${middle(node)} y2=${middle(node)}/>
        ${node.edge && lanes.has(node.edge.source) && html`<path d=${`M${start(node)} ${middle(lanes.get(node.edge.source))} V${middle(node)}`}/>`}
        ${node.kind === "snapshot" ? html`<rect x=${start(node) - 4} y=${middle(node) - 4} width="8" height="8" transform=${`rotate(45 ${start(node)} ${middle(node)})`}/>` : html`<circle cx=${start(node)} cy=${middle(node)} r="4"/>`}
        <title>${title(node)}</title></g>`)}</svg>
      <div class="ticks quiet num">${axis.ticks.map(([time, place]) => html`<span style=${`left: ${MARGIN + place}px`}><${Time} at=${new Date(time).toISOString()}/></span>`)}<span style="right: 0">now</span></div></div></div>`;
}

const state = (node) => (node.status === null ? "gone" : node.kind === "snapshot" ? "kept" : clean(node.status));

function name(node) {
  const project = node.project ?? "default";
  if (node.status === null) return html`<s class="quiet" title="Deleted"><${Said}>${node.name}<//></s>`;
  if (node.kind === "vm") return html`<a href=${toVm({ name: node.name, project })}>${clean(node.name)}</a>`;
  return html`<${Said}>${node.name}<//>`;
}

function title(node) {
  const made = { fork: "Forked", snapshot: "Snapshot taken", restore: "Restored" }[node.edge?.kind] ?? "Created";
  const paused = node.edge?.paused_ms;
  return [`${clean(node.name)}: ${made.toLowerCase()} ${node.created_at ?? ""}`, node.deleted_at && `deleted ${node.deleted_at}`,
    paused !== null && paused !== undefined && `its source was paused for ${paused.toFixed(1)} ms`].filter(Boolean).join("; ");
}

function paused(node) {
  const took = node.edge?.paused_ms;
  return took === null || took === undefined ? "" : `${took.toFixed(0)} ms`;
}

function Actions({ node }) {
  if (node.status === null || !may("control")) return null;
  if (node.kind === "snapshot") {
    const snapshot = { name: node.name, project: node.project ?? "default" };
    return html`<button class="plain" onClick=${() => askCreateFrom(snapshot)}>Restore…</button>
      <button class="plain danger" onClick=${() => askDelete(snapshot)}>Delete…</button>`;
  }
  const vm = vmOf(node);
  if (!vm) return null;
  return html`${possible("fork", vm) && html`<button class="plain" onClick=${() => run("fork", vm)}>Fork…</button>
    <button class="plain wide-only" onClick=${() => run("snapshot", vm)}>Snapshot…</button>`}
    <button class="plain danger" onClick=${() => run("delete", vm)}>Delete…</button>`;
}

function askDelete(snapshot) {
  ask((close) => html`<${FormDialog} title=${`Delete ${clean(snapshot.name)}?`} action="Delete" danger close=${close} act=${async () => {
    await client.del(path`api/v1/snapshots/${snapshot.name}`, { project: named(snapshot.project) });
    notify(`${snapshot.name} is deleted`);
  }}><p>VMs that were made from it go on.</p><//>`);
}
