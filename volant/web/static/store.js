/**
 * What the page knows: the VMs, the newest events, the caller, and whether all of it is current.
 *
 * It shows what is committed: a list as the beginning, then each event in order. After a lost connection it continues
 * after the last event. Where the daemon has no such event any more, it lists again, and says that it missed some. Tabs of
 * one browser share the stream.
 */
import { batch, computed, signal } from "@preact/signals";
import { ApiError, Client, path } from "./api.js";
import { Tabs } from "./tabs.js";

export const client = new Client();

/** The caller: `{caller, role, project, permissions, signed_in}`; null: not known; false: it has to sign in. */
export const session = signal(null);
/** Why the caller was signed out, for people. */
export const signedOut = signal("");
/** Why the sign-in at the issuer has failed. */
export const signInProblem = signal(null);
/** `connecting`, `live` or `lost`. */
export const connection = signal("connecting");
/** When the connection was lost. */
export const lostAt = signal(null);
/** The host that answers, where there is a fleet of them; null: there is one host. */
export const host = signal(null);
/** The fleet, as that host sees it; null: there is none, or nothing is known of it yet. */
export const fleet = signal(null);
/** How often events were missed, so that the lists were read again. */
export const gaps = signal(0);
/** Counts changes of `vms`; at most one a frame. */
export const revision = signal(0);
/** The newest events of VMs, the newest first. Read it through `revision`. */
export const events = [];
/** VMs by id. The views are the daemon's own; an event replaces the members that it names. */
export const vms = new Map();

export const may = (permission) => Boolean(session.value && session.value.permissions.includes(permission));
/** Whether the caller sees several projects. */
export const seesAll = computed(() => Boolean(session.value) && session.value.project === null);

export const TYPES = ["VM_CREATED", "VM_STARTING", "VM_RUNNING", "VM_PAUSED", "VM_STOPPING", "VM_STOPPED", "VM_CRASHED",
  "VM_DELETED", "VM_FORKED", "VM_RESTORED", "VM_REPLICA_FAILED", "SNAPSHOT_TAKEN", "SNAPSHOT_DELETED", "WORKLOAD_STARTED", "WORKLOAD_READY", "WORKLOAD_EXITED", "WORKLOAD_FAILED"];
const KEPT_EVENTS = 500;
const FIRST_PAUSE_MS = 250;
const LAST_PAUSE_MS = 5000;
/** A stream that was silent for so long is opened again, as nobody can see whether it still works. */
const SILENCE_MS = 60_000;
/** A page that nobody sees gives its connection back after that: browsers allow six to an origin. */
const HIDDEN_MS = 60_000;
const MANY = 20;
/** No event says that a host of a fleet is gone, as it would be the one to say so. */
const FLEET_MS = 5000;
const READ_MS = 150;
/** After a change, at the latest. */
const SHOW_MS = 200;
/** After a request that failed, as when the computer has just changed its network. */
const READ_AGAIN_MS = 1000;
/** The view that was open when the page left for the issuer. */
const LEFT = "volant-left";

let after = null;
/** Ends following; null: nothing is followed. */
let following = null;
let heard = 0;
const listeners = new Set();
/** The ids of the newest events that they had. */
const recent = new Set();
const watched = new Set();
const stale = new Set();

/** Returns the state of a VM for people: while its host gives no sign of life, nobody knows the true one. */
export const stateOf = (vm) => (vm.unreachable ? "unreachable" : vm.status);

/** Finds a VM by its project and name. */
export function findVm(project, name) {
  for (const vm of vms.values()) if (vm.name === name && vm.project === project) return vm;
  return undefined;
}

/** Calls `listener` with each event from now on; returns what ends that. */
export function onEvent(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** Learns who the caller is, and begins to follow. */
export async function start() {
  client.onSignedOut = async (code) => {
    // A guest may answer 401, too: the daemon says whether it was one of its own.
    const ended = await client.session().then(() => false, (error) => error.status === 401);
    if (ended) end(code === "session-ended" || code === "credentials-ended" ? "Your session has ended." : "");
  };
  await begin();
}

/** Another tab has signed in or out, for all of them. */
client.onOtherPage((signedIn) => {
  if (session.value || !signedIn) end(signedIn ? "" : "You have signed out.");
  if (signedIn) begin();
});

async function begin() {
  for (let pause = FIRST_PAUSE_MS; ; pause = Math.min(2 * pause, LAST_PAUSE_MS)) {
    try {
      session.value = (await finishSignIn()) ?? (await client.session());
      break;
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) return end(client.proof ? "Your session has ended." : "");
      connection.value = "lost";
      await sleep(pause);
    }
  }
  signInProblem.value = null;
  follow();
}

export async function signIn(key) {
  session.value = await client.signIn(key);
  signedOut.value = "";
  signInProblem.value = null;
  follow();
}

/** Leaves for the issuer, at which people sign in. It sends them back to this page. */
export async function leaveForIssuer() {
  const url = await client.beginSignIn();
  sessionStorage.setItem(LEFT, location.hash);
  location.assign(url);
}

async function finishSignIn() {
  let began = null;
  try {
    began = await client.finishSignIn();
  } catch (error) {
    if (!error.status) throw error;
    signInProblem.value = error;
  }
  const left = sessionStorage.getItem(LEFT);
  sessionStorage.removeItem(LEFT);
  if (began && left) location.hash = left;
  return began;
}

export async function signOut() {
  try {
    await client.signOut();
  } finally {
    end("You have signed out.");
  }
}

function end(why) {
  following?.abort();
  following = null;
  batch(() => {
    session.value = false;
    signedOut.value = why;
    vms.clear();
    events.length = 0;
    after = null;
    fleet.value = null;
    revision.value++;
  });
}

async function follow() {
  if (following) return;
  const { signal } = following = new AbortController();
  // Tabs of one session see the same.
  const tabs = new Tabs(`volant ${client.base} ${client.proof ?? ""}`, {
    position: () => after,
    state: () => ({ after, host: host.value, vms: [...vms.values()], events: [...events], connection: connection.value, lostAt: lostAt.value }),
    replace, take, status: show, missed: () => { gaps.value++; },
  });
  signal.addEventListener("abort", () => tabs.close());
  while (!signal.aborted) {
    await visible();
    await tabs.lead(() => lead(tabs, signal), signal).catch((error) => { if (!signal.aborted) throw error; });
  }
}

const show = (said) => batch(() => { connection.value = said.connection; lostAt.value = said.lostAt ?? null; });

/** Has the stream, until the page is hidden for long: then another tab may have it. */
async function lead(tabs, signal) {
  const tell = (said) => { show(said); tabs.status(said); };
  let pause = FIRST_PAUSE_MS;
  while (!signal.aborted && hiddenFor() <= HIDDEN_MS) {
    const began = Date.now();
    let ours = false;
    try {
      if (after === null) await list(signal);
      ours = await stream(tabs, signal);
    } catch (error) {
      if (!(error instanceof ApiError || signal.aborted)) console.error(error);
    }
    if (signal.aborted) return;
    if (!ours && connection.value !== "lost") tell({ connection: "lost", lostAt: new Date() });
    // Streams that end at once, each time, are no reason to hurry.
    if (Date.now() - began > LAST_PAUSE_MS) pause = FIRST_PAUSE_MS;
    await sleep(pause * (0.5 + Math.random() / 2));
    pause = Math.min(2 * pause, LAST_PAUSE_MS);
  }
}

/** Takes over all that another tab has. */
function replace(state) {
  const began = after !== null;
  vms.clear();
  for (const vm of state.vms) vms.set(vm.id, vm);
  events.splice(0, Infinity, ...state.events);
  after = state.after;
  host.value = state.host;
  show(state);
  if (began) for (const event of state.events.toReversed()) hear(event);
  // That tab is about to read what no event says of them.
  for (const vm of state.vms) if (vm.cpu_cores === null) readSoon(vm.id);
  changed();
}

async function list(signal) {
  const answer = await client.send("GET", "api/v1/vms", { query: { project: scope() }, signal });
  const found = await answer.json();
  vms.clear();
  for (const vm of found) vms.set(vm.id, vm);
  after = answer.headers.get("Volant-Event-Id");
  host.value = answer.headers.get("Volant-Host");
  changed();
  lookAtFleet();
}

/** Reads which hosts give no sign of life, and the VMs again when these are others than before. */
async function lookAtFleet() {
  if (!session.value || host.value === null || connection.value === "lost" || document.hidden) return;
  try {
    const found = await client.get("api/v1/fleet");
    const before = fleet.value?.unreachable ?? [];
    const changes = found.unreachable.join() !== before.join();
    if (changes) {
      for (const vm of await client.get("api/v1/vms", { query: { project: scope() } })) {
        const known = vms.get(vm.id);
        if (!known || (known.unreachable ?? null) === vm.unreachable) continue;
        // The last report has less in it than the page has heard.
        vms.set(vm.id, vm.unreachable || isNewer(known, vm) ? { ...known, unreachable: vm.unreachable } : vm);
      }
      changed();
    }
    fleet.value = found;
  } catch (error) {
    if (error.status === 409) fleet.value = null;
  }
}
setInterval(lookAtFleet, FLEET_MS);

/** Follows until the connection ends. Returns whether the page itself has ended it. */
async function stream(tabs, signal) {
  const opened = await client.events("api/v1/events/vms", { query: { last_event_id: after, project: scope() } });
  heard = Date.now();
  return new Promise((resolve) => {
    const finish = (ours) => {
      clearInterval(watch);
      signal.removeEventListener("abort", onAbort);
      opened.close();
      resolve(ours);
    };
    const watch = setInterval(() => {
      if (Date.now() - heard > SILENCE_MS || hiddenFor() > HIDDEN_MS) finish(true);
    }, 5000);
    const onAbort = () => finish(true);
    signal.addEventListener("abort", onAbort);
    if (signal.aborted) finish(true);
    opened.onopen = () => { show({ connection: "live" }); tabs.begin(); };
    opened.onerror = () => finish(false);
    for (const type of TYPES) opened.addEventListener(type, ({ data, lastEventId }) => {
      heard = Date.now();
      const said = { event: JSON.parse(data), id: lastEventId };
      tabs.pass(said);
      take(said);
    });
    opened.addEventListener("STREAM_GAP", () => {
      gaps.value++;
      after = null;
      tabs.missed();
      finish(true);
    });
  });
}

function take({ event, id }) {
  after = id;
  events.unshift(event);
  if (events.length > KEPT_EVENTS) events.length = KEPT_EVENTS;
  apply(event);
  hear(event);
  changed();
}

/** Calls the listeners, unless they know the event: what another tab has may begin before what this one has. */
function hear(event) {
  if (recent.has(event.id)) return;
  recent.add(event.id);
  if (recent.size > 2 * KEPT_EVENTS) recent.delete(recent.values().next().value);
  for (const listener of listeners) listener(event);
}

/** Changes a VM as an event says. What no event says (its size, its process) is read, of new VMs and of watched ones. */
function apply(event) {
  if (event.type.startsWith("SNAPSHOT_") && !vms.has(event.vm_id)) return;
  if (event.type === "VM_DELETED") {
    vms.delete(event.vm_id);
    return;
  }
  const known = vms.get(event.vm_id);
  const said = {
    status: event.status, ip_address: event.ip_address, updated_at: event.timestamp, labels: event.labels ?? {},
    reason: event.reason ?? (event.status === known?.status ? known.reason : null),
  };
  if (event.workload) said.workload = event.workload;
  vms.set(event.vm_id, known ? { ...known, ...said } : fresh(event, said));
  if (!known || watched.has(event.vm_id)) readSoon(event.vm_id);
}

/** Keeps all members of a VM current, also those that events don't say; returns what ends that. */
export function watch(id) {
  watched.add(id);
  readSoon(id);
  return () => watched.delete(id);
}

function readSoon(id, pause = READ_MS) {
  if (!stale.size) setTimeout(refresh, pause);
  stale.add(id);
}

function fresh(event, said) {
  return {
    id: event.vm_id, name: event.name, project: event.project ?? "default", plugin: "", cpu_cores: null, memory_mb: null,
    created_at: event.timestamp, started_at: null, restarts: 0, warnings: [], ports: [], ...said,
  };
}

async function refresh() {
  const ids = [...stale];
  stale.clear();
  try {
    if (ids.length > MANY) {
      const before = new Map(vms);
      for (const vm of await client.get("api/v1/vms", { query: { project: scope() } })) put(vm, before.get(vm.id));
    } else {
      await Promise.all(ids.map(reread));
    }
  } catch {
    // The connection shows whether the daemon is there. No event may come that would have them read again.
    for (const id of ids) if (vms.has(id)) readSoon(id, READ_AGAIN_MS);
  }
  changed();
}

async function reread(id) {
  const known = vms.get(id);
  if (!known) return;
  try {
    const vm = await client.get(path`api/v1/vms/${known.name}`, { project: named(known.project) });
    if (vm.id === id) put(vm, known);
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 404)) throw error;
  }
}

/** Puts a VM that was asked for when `before` was known of it. What was heard of it since may be newer than the answer. */
function put(vm, before) {
  if (!vms.has(vm.id)) return;
  if (vms.get(vm.id) === before) vms.set(vm.id, vm);
  else readSoon(vm.id);
}

const isNewer = (one, other) => Date.parse(one.updated_at) > Date.parse(other.updated_at);

let pending = false;
function changed() {
  if (pending) return;
  pending = true;
  const run = () => {
    if (pending) revision.value++;
    pending = false;
  };
  requestAnimationFrame(run);
  // Frames don't come while the page is hidden, and may stop just now.
  setTimeout(run, SHOW_MS);
}

/** Returns what `project` has to be for one project; undefined: the caller's own. */
export const named = (project) => (seesAll.value && project !== "default" ? project : undefined);
const scope = () => (seesAll.value ? "*" : undefined);

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

let hiddenSince = document.hidden ? Date.now() : null;
document.addEventListener("visibilitychange", () => { hiddenSince = document.hidden ? Date.now() : null; });
const hiddenFor = () => (hiddenSince === null ? 0 : Date.now() - hiddenSince);
const visible = () => (document.hidden && hiddenFor() > HIDDEN_MS
  ? new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }))
  : Promise.resolve());
