/** Small pieces that all views use. Everything that comes from elsewhere is shown as text, never as markup. */
import { h } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { signal } from "@preact/signals";
import htm from "htm";

export const html = htm.bind(h);

// The address: #/vms/web/log?q=…

/** `{parts: ["vms", "web"], query: {q: "…"}}` */
export const route = signal(parse());
window.addEventListener("hashchange", () => { route.value = parse(); });

function parse() {
  const [place, query] = location.hash.replace(/^#\/?/, "").split("?");
  return { parts: place.split("/").filter(Boolean).map(decode), query: Object.fromEntries(new URLSearchParams(query)) };
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Returns the address of a view. */
export function to(...parts) {
  const query = typeof parts.at(-1) === "object" ? parts.pop() : {};
  const words = new URLSearchParams(Object.entries(query).filter(([, value]) => value)).toString();
  return `#/${parts.map(encodeURIComponent).join("/")}${words ? `?${words}` : ""}`;
}

/** The address of a VM's view. The project is in it, unless it is `default`. */
export const toVm = (vm, ...more) =>
  vm.project === "default" ? to("vms", vm.name, ...more) : to("projects", vm.project, "vms", vm.name, ...more);

/** Goes to an address. `replace`: without a step in the history, as for each letter of a search. */
export function go(address, replace = false) {
  if (!replace) {
    location.hash = address;
    return;
  }
  history.replaceState(null, "", address);
  route.value = parse();
}

// Text

// eslint-disable-next-line no-control-regex
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;
// eslint-disable-next-line no-control-regex
const ESCAPES = /\u001b(?:\[[0-?]*[ -/]*[@-~]|\][^\u0007\u001b]*(?:\u0007|\u001b\\)?|[PX^_][^\u001b]*(?:\u001b\\)?|[@-Z\\-_])/g;

/** Makes characters visible that could hide or reorder others. */
export const clean = (text) => String(text ?? "").replace(INVISIBLE, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
/** As `clean`, without a terminal's control sequences. */
export const plain = (text) => clean(String(text ?? "").replace(ESCAPES, ""));

/** Text of somebody else. */
export const Said = ({ children }) => html`<span class="said">${clean(children)}</span>`;

/** Text in which code stands between backticks. */
export const Text = ({ of }) => of.split("`").map((part, at) => (at % 2 ? html`<code>${part}</code>` : part));

export function size(mb) {
  if (mb === null || mb === undefined) return "–";
  return mb >= 1024 ? `${+(mb / 1024).toFixed(1)} GiB` : `${Math.round(mb)} MiB`;
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (count >= 1024 && at < units.length - 1) { count /= 1024; at++; }
  return `${at && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[at]}`;
}

export function lasting(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.floor(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

/** A time in the reader's zone, with UTC on hover. */
export function Time({ at, full = false }) {
  if (!at) return "–";
  const date = new Date(at);
  const recent = Date.now() - date < 20 * 3600e3;
  return html`<time class="num" datetime=${at} title=${at}>${recent && !full ? clock.format(date) : day.format(date)}</time>`;
}

/** How long ago, which goes on by itself. */
export function Ago({ at }) {
  const now = useNow(at && Date.now() - new Date(at) > 3600e3 ? 60_000 : 1000);
  if (!at) return "–";
  return html`<time class="num" datetime=${at} title=${at}>${lasting((now - new Date(at)) / 1000)}</time>`;
}

const ticks = new Map();
/** The time, read again at each interval; one timer for all that have the same. */
function useNow(every) {
  const tick = ticks.get(every) ?? signal(Date.now());
  if (!ticks.has(every)) {
    ticks.set(every, tick);
    setInterval(() => { if (!document.hidden) tick.value = Date.now(); }, every);
  }
  return Math.max(tick.value, Date.now() - every);
}

export const State = ({ of }) => html`<span class="state ${clean(of)}">${clean(of)}</span>`;

export function Labels({ of, link = false }) {
  const pairs = Object.entries(of ?? {});
  return pairs.map(([key, value]) => {
    const text = clean(value ? `${key}=${value}` : key);
    return html`${link
      ? html`<a class="tag" href=${to("vms", { label: `${key}=${value}` })} title=${text}>${text}</a>`
      : html`<span class="tag" title=${text}>${text}</span>`} `;
  });
}

export function Facts({ of }) {
  return html`<dl class="facts">${of.filter((fact) => fact && fact[1] !== null && fact[1] !== undefined && fact[1] !== "")
    .map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>`;
}

export function Code({ text, label }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard?.writeText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return html`<div class="code"><pre tabindex="0" aria-label=${label}>${text}</pre>
    ${navigator.clipboard && html`<button class="plain" onClick=${copy}>${copied ? "Copied" : "Copy"}</button>`}</div>`;
}

export const Mark = () => html`<svg viewBox="0 0 32 32" aria-hidden="true"><rect width="32" height="32" rx="7" fill="#2457d6"/>
  <path d="M7 9l9 15 9-15" fill="none" stroke="#fff" stroke-width="3.4" stroke-linecap="round" stroke-linejoin="round"/>
  <circle cx="16" cy="9" r="2.4" fill="#fff"/></svg>`;

export const Empty = ({ title, children }) => html`<div class="empty"><h2>${title}</h2>${children}</div>`;

export function Problem({ of }) {
  if (!of) return null;
  return html`<div class="note bad" role="alert"><${Said}>${of.message}<//>
    ${of.hint && html`<div class="quiet"><${Said}>${of.hint}<//></div>`}</div>`;
}

/** Adds a style sheet of the console, once. */
export function addStyle(name) {
  const address = new URL(name, import.meta.url).href;
  if ([...document.styleSheets].some((sheet) => sheet.href === address)) return Promise.resolve();
  return new Promise((resolve, reject) => {
    const link = Object.assign(document.createElement("link"), { rel: "stylesheet", href: address, onload: resolve, onerror: reject });
    document.head.append(link);
  });
}

// Notices

export const notices = signal([]);

export function notify(text, problem = false) {
  const notice = { text, problem };
  notices.value = [...notices.value.slice(-3), notice];
  setTimeout(() => dismiss(notice), problem ? 12_000 : 4000);
}

const dismiss = (notice) => { notices.value = notices.value.filter((other) => other !== notice); };

export const complain = (error) => notify([error.message, error.hint].filter(Boolean).join(" – "), true);

export const Notices = () => html`<div class="notices" role="status">${notices.value.map((notice) => html`
  <div class="notice ${notice.problem ? "bad" : ""}"><${Said}>${notice.text}<//>
  <button class="plain" aria-label="Dismiss" onClick=${() => dismiss(notice)}>✕</button></div>`)}</div>`;

// Dialogs

/** What is asked now: a function that renders it, or null. */
export const asked = signal(null);

/** Shows a dialog. `render` gets a function that closes it. */
export const ask = (render) => { asked.value = render; };

export function Dialog({ title, children, close, palette = false }) {
  const element = useRef(null);
  useEffect(() => {
    element.current.showModal();
  }, []);
  return html`<dialog ref=${element} class=${palette ? "palette" : ""} aria-label=${title} onClose=${close}
    onClick=${(event) => { if (event.target === element.current) close(); }}>
    ${!palette && html`<h1>${title}</h1>`}${children}</dialog>`;
}

/** A dialog with a form. `act` may throw; its error is shown. */
export function FormDialog({ title, close, action, danger = false, act, children }) {
  const [problem, setProblem] = useState(null);
  const [busy, setBusy] = useState(false);
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    setProblem(null);
    try {
      await act(new FormData(event.target));
      close();
    } catch (error) {
      setProblem(error);
      setBusy(false);
    }
  };
  return html`<${Dialog} title=${title} close=${close}><form onSubmit=${submit}>${children}<${Problem} of=${problem}/>
    <div class="end"><button type="button" onClick=${close}>Cancel</button>
    <button class=${danger ? "danger" : "first"} disabled=${busy}>${action}</button></div></form><//>`;
}

/** Reads something again and again while the view is there and visible, or once if `every` is 0. Returns `[value, error]`. */
export function usePolled(read, every, keys = []) {
  const [state, setState] = useState([null, null]);
  useEffect(() => {
    let over = false;
    let timer;
    const run = async () => {
      if (!document.hidden || !every) {
        try {
          const value = await read();
          if (!over) setState([value, null]);
        } catch (error) {
          if (!over) setState(([value]) => [value, error]);
        }
      }
      if (!over && every) timer = setTimeout(run, every);
    };
    run();
    return () => { over = true; clearTimeout(timer); };
  }, keys);
  return state;
}

/** The window of a long list that is to be shown: `[ref, first, last, scroll]`, by rows of one height. */
export function useWindow(count, rowHeight, spare = 8) {
  const element = useRef(null);
  const [view, setView] = useState({ top: 0, height: 600 });
  useEffect(() => {
    const body = element.current;
    if (!body) return undefined;
    let waiting = false;
    const measure = () => {
      waiting = false;
      setView({ top: body.scrollTop, height: body.clientHeight });
    };
    const soon = () => {
      if (!waiting) { waiting = true; requestAnimationFrame(measure); }
    };
    const sizes = new ResizeObserver(soon);
    sizes.observe(body);
    body.addEventListener("scroll", soon, { passive: true });
    measure();
    return () => { sizes.disconnect(); body.removeEventListener("scroll", soon); };
  }, [element.current]);
  const first = Math.max(0, Math.floor(view.top / rowHeight) - spare);
  const last = Math.min(count, Math.ceil((view.top + view.height) / rowHeight) + spare);
  return [element, first, last];
}
