/** All VMs: a list that shows thousands without a stall, with search, filters in the address, and actions with many. */
import { useEffect, useRef, useState } from "preact/hooks";
import { connection, may, revision, seesAll, stateOf, vms } from "../store.js";
import { Ago, Empty, Labels, State, clean, go, html, route, size, to, toVm, useWindow } from "../ui.js";
import { ACTIONS, possible, run, runMany } from "../actions.js";

const STATES = ["running", "starting", "pending", "paused", "stopping", "stopped", "crashed", "deleting", "unreachable"];
const BULK = ["start", "stop", "pause", "resume", "restart", "delete"];
const rowHeight = () => parseInt(getComputedStyle(document.documentElement).getPropertyValue("--row"), 10);

/** Returns the VMs that an address asks for, the newest first. */
function select({ q = "", state = "", label = "", project = "" }) {
  const words = q.toLowerCase().split(/\s+/).filter(Boolean);
  const [key, ...rest] = label.split("=");
  const value = rest.join("=");
  const found = [];
  for (const vm of vms.values()) {
    if (state && stateOf(vm) !== state) continue;
    if (project && vm.project !== project) continue;
    if (label && (vm.labels[key] === undefined || (rest.length && vm.labels[key] !== value))) continue;
    if (words.length) {
      const text = `${vm.name} ${vm.plugin} ${vm.image?.reference ?? ""} ${vm.reason?.code ?? ""} ${Object.entries(vm.labels).map(([name, one]) => `${name}=${one}`).join(" ")}`.toLowerCase();
      if (!words.every((word) => text.includes(word))) continue;
    }
    found.push(vm);
  }
  return found.sort((one, other) => other.id - one.id);
}

export function Vms() {
  const { query } = route.value;
  revision.value;
  const found = select(query);
  const [picked, setPicked] = useState(new Set());
  const [active, setActive] = useState(0);
  const height = rowHeight();
  const [body, first, last] = useWindow(found.length, height);
  const list = useRef(null);
  const filter = (changes) => go(to("vms", { ...query, ...changes }), true);
  const chosen = found.filter((vm) => picked.has(vm.id));
  const at = Math.min(active, found.length - 1);

  const pick = (vm) => {
    const next = new Set(picked);
    next.delete(vm.id) || next.add(vm.id);
    setPicked(next);
  };
  const moveTo = (index) => {
    const next = Math.max(0, Math.min(found.length - 1, index));
    setActive(next);
    const top = next * height;
    const view = body.current;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (top + height > view.scrollTop + view.clientHeight) view.scrollTop = top + height - view.clientHeight;
  };
  const onKeyDown = (event) => {
    const page = Math.floor(body.current.clientHeight / height);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -found.length, End: found.length }[event.key];
    if (step) moveTo(at + step);
    else if (event.key === "Enter" && found[at] && event.target === list.current) go(toVm(found[at]));
    else if (event.key === " " && found[at] && may("control") && event.target === list.current) pick(found[at]);
    else return;
    event.preventDefault();
  };

  const projects = seesAll.value ? [...new Set([...vms.values()].map((vm) => vm.project))].sort() : [];
  const filtered = query.q || query.state || query.label || query.project;
  return html`<main class="main full">
    <div class="head"><h1>VMs</h1><span class="quiet num" role="status">${filtered ? `${found.length} of ${vms.size}` : vms.size || ""}</span><span class="space"></span>
      ${may("control") && html`<a class="button first" href=${to("create")}>Create VM</a>`}</div>
    ${(vms.size > 0 || filtered) && html`<div class="tools">
      <input type="search" aria-label="Search VMs" placeholder="Search name, image, label, reason" value=${query.q ?? ""}
        onInput=${(event) => filter({ q: event.target.value })} onKeyDown=${(event) => { if (event.key === "ArrowDown") { event.preventDefault(); list.current.focus(); } }}/>
      <select aria-label="State" value=${query.state ?? ""} onChange=${(event) => filter({ state: event.target.value })}>
        <option value="">All states</option>${STATES.map((state) => html`<option value=${state}>${state}</option>`)}</select>
      ${projects.length > 1 && html`<select aria-label="Project" value=${query.project ?? ""} onChange=${(event) => filter({ project: event.target.value })}>
        <option value="">All projects</option>${projects.map((project) => html`<option value=${project}>${project}</option>`)}</select>`}
      ${query.label && html`<span class="tag">${clean(query.label)}</span>`}
      ${filtered && html`<button class="plain" onClick=${() => go(to("vms"), true)}>Clear</button>`}</div>`}
    ${chosen.length > 0 && html`<div class="bulk" role="region" aria-label="Selected VMs"><b class="num">${chosen.length} selected</b>
      ${BULK.map((action) => html`<button class=${ACTIONS[action].danger ? "danger" : ""} disabled=${!chosen.some((vm) => possible(action, vm))}
        onClick=${() => runMany(action, chosen, () => setPicked(new Set()))}>${ACTIONS[action].title}</button>`)}
      <span class="space"></span><button class="plain" onClick=${() => setPicked(new Set())}>Clear</button></div>`}
    ${!found.length ? html`<${Nothing} filtered=${filtered}/>` : html`
    <div class="list" role="table" aria-label="VMs" aria-rowcount=${found.length + 1} tabindex="0" ref=${list} onKeyDown=${onKeyDown}>
      <div class="body" ref=${body}>
      <div class="vmrow header" role="row" aria-rowindex="1">
        <span class="pick" role="columnheader">${may("control") ? html`<input type="checkbox" aria-label="Select all that are shown"
          checked=${chosen.length > 0 && chosen.length === found.length} onChange=${(event) => setPicked(new Set(event.target.checked ? found.map((vm) => vm.id) : []))}/>` : html`<span class="hidden">Selection</span>`}</span>
        <span role="columnheader">Name</span><span role="columnheader">State</span><span role="columnheader">Runs</span>
        <span role="columnheader">Size</span><span role="columnheader">Labels</span><span role="columnheader">Age</span></div>
      <div class="rows" role="rowgroup" style=${`height: ${found.length * height}px`}>
        ${found.slice(first, last).map((vm, index) => html`<${Row} key=${vm.id} vm=${vm} index=${first + index} top=${(first + index) * height}
          picked=${picked.has(vm.id)} active=${first + index === at} onPick=${pick} onActive=${setActive} several=${projects.length > 1}/>`)}</div></div>
    </div>`}</main>`;
}

/** Returns why a VM is in its state, where there is a reason. */
function why(vm) {
  if (vm.unreachable) return clean(`the host ${vm.unreachable} gives no sign of life; the last state that it has reported: ${vm.status}`);
  return vm.reason ? clean(`${vm.reason.code}: ${vm.reason.message}`) : null;
}

function Row({ vm, index, top, picked, active, several, onPick, onActive }) {
  return html`<div class=${`vmrow data ${picked ? "picked" : ""} ${active ? "active" : ""}`} role="row" aria-rowindex=${index + 2} style=${`top: ${top}px`}
    onPointerDown=${() => onActive(index)}>
    <span class="pick" role="cell">${may("control") && html`<input type="checkbox" aria-label=${`Select ${vm.name}`} checked=${picked} onChange=${() => onPick(vm)}/>`}</span>
    <span class="name" role="cell"><a class="name" href=${toVm(vm)}>${vm.name}</a>${several && html` <small>${vm.project}</small>`}</span>
    <span class="status" role="cell" title=${why(vm)}><${State} of=${stateOf(vm)}/></span>
    <span class="plugin quiet" role="cell">${clean(vm.image?.reference ?? vm.plugin)}</span>
    <span class="size num quiet" role="cell">${vm.cpu_cores ? `${vm.cpu_cores} × ${size(vm.memory_mb)}` : ""}</span>
    <span class="labels" role="cell"><${Labels} of=${vm.labels} link/></span>
    <span class="age quiet" role="cell"><${Ago} at=${vm.created_at}/></span></div>`;
}

function Nothing({ filtered }) {
  if (filtered) {
    return html`<${Empty} title="No VM is like that"><p>Nothing has these words, this state and these labels.</p>
      <button onClick=${() => go(to("vms"), true)}>Show all VMs</button><//>`;
  }
  if (connection.value !== "live") return html`<p class="quiet" role="status">Reading…</p>`;
  return html`<${Empty} title="No VMs yet"><p>A VM boots in seconds. It can run an OCI image, a plugin, or just a small Linux to work in;
    it can be forked while it runs, and it outlives this daemon.</p>
    ${may("control") ? html`<a class="button first" href=${to("create")}>Create VM</a>` : html`<p class="quiet">Your role can't create any.</p>`}<//>`;
}
