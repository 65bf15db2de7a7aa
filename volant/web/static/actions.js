/** What one can do with VMs: which actions there are, for whom, in which state; one at a time, or many with a preview. */
import { useState } from "preact/hooks";
import { client, may, named, stateOf } from "./store.js";
import { path } from "./api.js";
import { FormDialog, Said, State, ask, clean, complain, go, html, notify, to, toVm } from "./ui.js";

const UP = ["running", "paused"];

/** By name: in which states it does something, who may, and whether it can lose something. */
export const ACTIONS = {
  start: { title: "Start", from: ["stopped", "crashed"], done: "starts" },
  stop: { title: "Stop", from: ["pending", "starting", "running", "paused"], done: "stops" },
  restart: { title: "Restart", from: ["running", "paused"], done: "restarts" },
  pause: { title: "Pause", from: ["running"], done: "is being paused" },
  resume: { title: "Resume", from: ["paused"], done: "goes on" },
  fork: { title: "Fork…", from: UP, single: true },
  snapshot: { title: "Snapshot…", from: UP, single: true },
  delete: { title: "Delete…", from: null, danger: true, done: "is being deleted" },
};

export const possible = (action, vm) => {
  const { from } = ACTIONS[action];
  return vm.status !== "deleting" && !vm.unreachable && (from === null || from.includes(vm.status));
};

/** Returns the actions that the caller may use, with those of a VM's state. */
export const actionsFor = (vm) => (may("control") ? Object.keys(ACTIONS).filter((action) => possible(action, vm)) : []);

/** Does an action with a VM, or asks first. */
export function run(action, vm) {
  if (action === "delete") return ask((close) => html`<${AskDelete} vm=${vm} close=${close}/>`);
  if (action === "fork") return ask((close) => html`<${AskFork} vm=${vm} close=${close}/>`);
  if (action === "snapshot") return ask((close) => html`<${AskSnapshot} vm=${vm} close=${close}/>`);
  return send(action, vm).then(() => notify(`${vm.name} ${ACTIONS[action].done}`), complain);
}

function send(action, vm) {
  const project = named(vm.project);
  if (action === "delete") return client.del(path`api/v1/vms/${vm.name}`, { project });
  return client.post(path`api/v1/vms/${vm.name}/${action}`, {}, { project, idempotent: true });
}

function AskDelete({ vm, close }) {
  return html`<${FormDialog} title=${`Delete ${vm.name}?`} action="Delete" danger close=${close}
    act=${async () => { await send("delete", vm); notify(`${vm.name} is being deleted`); }}>
    <p>Its guest is stopped, and its disk and its log are removed. Snapshots of it stay.</p><//>`;
}

function AskFork({ vm, close }) {
  const act = async (form) => {
    const names = String(form.get("names")).split(/[\s,]+/).filter(Boolean);
    const body = names.length ? { names } : { count: Number(form.get("count")) };
    const copies = await client.post(path`api/v1/vms/${vm.name}/fork`, body, { project: named(vm.project), idempotent: true, patience: 120_000 });
    notify(`Forked ${vm.name}: ${copies.map((copy) => copy.name).join(", ")}`);
  };
  return html`<${FormDialog} title=${`Fork ${vm.name}`} action="Fork" close=${close} act=${act}>
    <p>The copies continue from where this VM is now: its memory, its processes and its disk. It keeps running itself.</p>
    <div class="two"><label class="field"><span>Copies</span><input name="count" type="number" min="1" max="32" value="1"/></label>
    <label class="field"><span>Names, if they matter</span><input name="names" placeholder=${`${vm.name}-fork-1`} autocomplete="off"/></label></div><//>`;
}

function AskSnapshot({ vm, close }) {
  const act = async (form) => {
    const body = { name: form.get("name") || undefined, description: form.get("description") || undefined };
    const made = await client.post(path`api/v1/vms/${vm.name}/snapshots`, body, { project: named(vm.project), idempotent: true, patience: 300_000 });
    notify(`Snapshot ${made.name} is ready`);
  };
  return html`<${FormDialog} title=${`Snapshot of ${vm.name}`} action="Take snapshot" close=${close} act=${act}>
    <p>Keeps memory, devices and disk as they are now. New VMs can continue from it, also when this VM is gone.</p>
    <label class="field"><span>Name</span><input name="name" placeholder=${`${vm.name} and the time`} autocomplete="off"/></label>
    <label class="field"><span>Description</span><input name="description" autocomplete="off"/></label><//>`;
}

/** Asks for the name of a VM that continues from a snapshot. */
export const askCreateFrom = (snapshot) => ask((close) => html`<${FormDialog} title=${`New VM from ${snapshot.name}`} action="Create"
  close=${close} act=${async (form) => {
    const project = named(snapshot.project ?? "default");
    const vm = await client.post("api/v1/vms", { name: form.get("name"), from_snapshot: snapshot.name }, { project, idempotent: true });
    go(toVm(vm));
  }}><p>It continues from the moment of the snapshot, as a VM of its own.</p>
  <label class="field"><span>Name</span><input name="name" required autocomplete="off"/></label><//>`);

/** Does an action with many VMs, after a preview of what it will do to which. */
export function runMany(action, vms, done) {
  ask((close) => html`<${AskMany} action=${action} vms=${vms} close=${close} done=${done}/>`);
}

function AskMany({ action, vms, close, done }) {
  const [results, setResults] = useState(new Map());
  const { title, danger } = ACTIONS[action];
  const name = title.replace("…", "");
  const wanted = vms.filter((vm) => possible(action, vm));
  const skipped = vms.length - wanted.length;
  const act = async () => {
    const left = [...wanted];
    const failed = [];
    // A few at a time: the daemon has other clients.
    await Promise.all(Array.from({ length: 6 }, async () => {
      for (let vm = left.shift(); vm; vm = left.shift()) {
        try {
          await send(action, vm);
          setResults((before) => new Map(before).set(vm.id, "done"));
        } catch (error) {
          failed.push(error);
          setResults((before) => new Map(before).set(vm.id, error.message));
        }
      }
    }));
    if (failed.length) throw new Error(`${failed.length} of ${wanted.length} failed: ${failed[0].message}`);
    notify(`${name}: ${wanted.length} VMs`);
    done();
  };
  return html`<${FormDialog} title=${`${name} ${wanted.length} ${wanted.length === 1 ? "VM" : "VMs"}?`} action=${name} danger=${danger} close=${close} act=${act}>
    ${action === "delete" && html`<p>Their guests are stopped, and their disks and logs are removed.</p>`}
    ${skipped > 0 && html`<p class="quiet">${skipped} of the selected are skipped: nothing would happen to them in their state.</p>`}
    <div class="scroll-x" style="max-height: 40vh; overflow: auto" tabindex="0" role="region" aria-label="The VMs"><table><tbody>${wanted.slice(0, 200).map((vm) => html`<tr>
      <td>${vm.name}</td><td class="narrow"><${State} of=${stateOf(vm)}/></td>
      <td class="quiet"><${Said}>${results.get(vm.id) ?? ""}<//></td></tr>`)}</tbody></table>
    ${wanted.length > 200 && html`<p class="quiet">and ${wanted.length - 200} more</p>`}</div><//>`;
}
