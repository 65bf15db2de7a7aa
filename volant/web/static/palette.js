/** The command palette: all views, all VMs, and all actions with the VM that is open. */
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { findVm, may, session, signOut, stateOf, vms } from "./store.js";
import { Dialog, complain, go, html, route, to, toVm } from "./ui.js";
import { ACTIONS, actionsFor, run } from "./actions.js";
import { RESOURCES, isShown } from "./views/resources.js";
import { tabsOf } from "./views/vm.js";

const SHOWN = 40;

function commands() {
  const { parts } = route.value;
  const open = parts[0] === "vms" && parts[1] ? findVm(session.value.project ?? "default", parts[1])
    : parts[0] === "projects" && parts[3] ? findVm(parts[1], parts[3]) : undefined;
  const found = [];
  if (open) {
    for (const action of actionsFor(open)) {
      found.push({ text: `${ACTIONS[action].title.replace("…", "")} ${open.name}`, kind: "Action", act: () => run(action, open) });
    }
    for (const [tab, [title]] of tabsOf(open)) {
      found.push({ text: `${open.name}: ${title.toLowerCase()}`, kind: "View", act: () => go(toVm(open, tab)) });
    }
  }
  if (may("control")) found.push({ text: "Create a VM", kind: "Action", act: () => go(to("create")) });
  found.push({ text: "Overview", kind: "View", act: () => go(to("overview")) }, { text: "VMs", kind: "View", act: () => go(to("vms")) },
    { text: "Forks and snapshots", kind: "View", act: () => go(to("forks")) });
  if (may("admin")) found.push({ text: "Supervisor tree", kind: "View", act: () => go(to("tree")) });
  for (const [place, resource] of Object.entries(RESOURCES)) {
    if (isShown(resource)) found.push({ text: resource.title, kind: "View", act: () => go(to(place)) });
  }
  for (const state of ["running", "crashed", "stopped"]) {
    found.push({ text: `VMs that are ${state}`, kind: "Filter", act: () => go(to("vms", { state })) });
  }
  for (const vm of vms.values()) found.push({ text: vm.name, kind: stateOf(vm), act: () => go(toVm(vm)) });
  found.push({ text: "API documentation", kind: "Page", act: () => { location.href = "docs"; } });
  if (session.value.signed_in) found.push({ text: "Sign out", kind: "Action", act: () => signOut().catch(complain) });
  return found;
}

export function Palette({ close }) {
  const all = useMemo(commands, []);
  const [text, setText] = useState("");
  const [at, setAt] = useState(0);
  const chosen = useRef(null);
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const found = all.filter((command) => words.every((word) => command.text.toLowerCase().includes(word))).slice(0, SHOWN);
  const index = Math.min(at, found.length - 1);
  useEffect(() => { chosen.current?.scrollIntoView({ block: "nearest" }); });
  const act = (command) => { close(); command.act(); };
  const onKeyDown = (event) => {
    if (event.key === "ArrowDown") setAt((index + 1) % found.length);
    else if (event.key === "ArrowUp") setAt((index + found.length - 1) % found.length);
    else if (event.key === "Enter" && found[index]) act(found[index]);
    else return;
    event.preventDefault();
  };
  return html`<${Dialog} title="Commands" palette close=${close}>
    <input type="text" role="combobox" aria-expanded="true" aria-controls="commands" aria-label="Search commands and VMs" autocomplete="off"
      aria-activedescendant=${found[index] ? `command-${index}` : null} placeholder="Search commands and VMs" value=${text} autofocus
      onInput=${(event) => { setText(event.target.value); setAt(0); }} onKeyDown=${onKeyDown}/>
    <ul role="listbox" id="commands" aria-label="Commands">${found.map((command, place) => html`<li role="option" id=${`command-${place}`}
      ref=${place === index ? chosen : null} aria-selected=${place === index} onClick=${() => act(command)}>
      <span>${command.text}</span><span class="quiet">${command.kind}</span></li>`)}
      ${!found.length && html`<li role="option" aria-selected="false" aria-disabled="true" class="quiet">Nothing is called that</li>`}</ul><//>`;
}
