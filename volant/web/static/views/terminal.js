/** Terminals: a command in the guest, and the serial console. xterm is loaded when the first one opens. */
import { useEffect, useRef, useState } from "preact/hooks";
import { client, named } from "../store.js";
import { path } from "../api.js";
import { Said, addStyle, clean, html } from "../ui.js";

/** A shell that is there: what people like first. */
const SHELL = ["/bin/sh", "-c", "command -v bash >/dev/null 2>&1 && exec bash -l; exec sh -l"];
const THEME = {
  background: "#0f1216", foreground: "#d7dce3", cursor: "#86aaff", selectionBackground: "#2d4a86",
  black: "#1d222a", red: "#ff8f87", green: "#5fd28c", yellow: "#edb83d", blue: "#86aaff", magenta: "#d3a1ff", cyan: "#5cd0d6", white: "#d7dce3",
  brightBlack: "#66717f", brightRed: "#ffb3ad", brightGreen: "#93e6b1", brightYellow: "#f7d27c", brightBlue: "#b3caff", brightMagenta: "#e5c8ff", brightCyan: "#97e5e9", brightWhite: "#ffffff",
};

/**
 * xterm writes its colours and sizes into style elements, which the page's policy forbids. Other elements, whose text
 * goes into a sheet that the script has made, take their place. Returns what removes the sheets.
 */
function withSheets(build) {
  const create = document.createElement;
  const sheets = [];
  document.createElement = function createElement(name, ...more) {
    if (String(name).toLowerCase() !== "style") return create.call(document, name, ...more);
    const sheet = new CSSStyleSheet();
    sheets.push(sheet);
    document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
    const element = create.call(document, "span");
    element.hidden = true;
    Object.defineProperty(element, "textContent", { get: () => "", set: (text) => sheet.replaceSync(text) });
    return element;
  };
  try {
    build();
  } finally {
    delete document.createElement;
  }
  return () => { document.adoptedStyleSheets = document.adoptedStyleSheets.filter((sheet) => !sheets.includes(sheet)); };
}

/** Shows a terminal. `connect(terminal, report)` returns what ends it. */
function Terminal({ connect, label, again }) {
  const box = useRef(null);
  const [state, setState] = useState({ text: "Connecting…" });
  useEffect(() => {
    let over = false;
    let end = () => {};
    (async () => {
      const [{ Terminal: Xterm }, { FitAddon }] = await Promise.all([import("@xterm/xterm"), import("@xterm/addon-fit"), addStyle("vendor/xterm.css")]);
      if (over) return;
      const terminal = new Xterm({
        theme: THEME, fontFamily: getComputedStyle(document.documentElement).getPropertyValue("--mono"), fontSize: 13, scrollback: 10_000, cursorBlink: !matchMedia("(prefers-reduced-motion: reduce)").matches,
        // What a guest prints is no address to go to.
        linkHandler: { activate: () => {} }, screenReaderMode: false,
      });
      const fit = new FitAddon();
      const removeSheets = withSheets(() => {
        terminal.loadAddon(fit);
        terminal.open(box.current);
      });
      fit.fit();
      const sizes = new ResizeObserver(() => fit.fit());
      sizes.observe(box.current);
      const close = await connect(terminal, setState);
      end = () => { close(); sizes.disconnect(); terminal.dispose(); removeSheets(); };
      if (over) end();
      else terminal.focus();
    })().catch((error) => setState({ text: error.message, over: true }));
    return () => { over = true; end(); };
  }, []);
  return html`<div class="tools"><span class="quiet" role="status"><${Said}>${state.text}<//></span>
      ${state.over && html`<button class="first" onClick=${again}>Open again</button>`}</div>
    <div class="term" ref=${box} role="region" aria-label=${label}></div>`;
}

/** Shows what a terminal is for, and a new one each time that it is opened again. */
function Reopened({ vm, possible, why, connect, label }) {
  const [round, setRound] = useState(0);
  if (!possible) return html`<p class="quiet">${why}</p>`;
  return html`<${Terminal} key=${round} again=${() => setRound(round + 1)} connect=${connect} label=${label}/>`;
}

export function Exec({ vm }) {
  const running = ["running"].includes(vm.status);
  const connect = async (terminal, report) => {
    const socket = await client.socket(path`api/v1/vms/${vm.name}/agent/v1/exec`, { project: named(vm.project), guest: true });
    const bytes = new TextEncoder();
    const send = (data) => {
      if (socket.readyState !== WebSocket.OPEN) return;
      const framed = new Uint8Array(data.length + 1);
      framed[0] = 0;
      framed.set(data, 1);
      socket.send(framed);
    };
    let last = "The connection was lost. The shell has ended with it.";
    socket.onopen = () => {
      socket.send(JSON.stringify({ command: SHELL, tty: true, rows: terminal.rows, cols: terminal.cols, env: { TERM: "xterm-256color" } }));
      report({ text: `A shell in ${vm.name}. It ends when you leave.` });
    };
    socket.onmessage = ({ data }) => {
      if (data instanceof ArrayBuffer) {
        terminal.write(new Uint8Array(data, 1));
        return;
      }
      const end = JSON.parse(data);
      if (end.error) last = end.error;
      else if (end.signal !== undefined) last = `The shell was ended by signal ${end.signal}.`;
      else if (end.exit_code !== undefined) last = `The shell has ended with exit code ${end.exit_code}.`;
    };
    socket.onclose = ({ code, reason }) => report({ text: code === 1000 ? last : reason || last, over: true });
    terminal.onData((text) => send(bytes.encode(text)));
    terminal.onBinary((text) => send(Uint8Array.from(text, (one) => one.charCodeAt(0))));
    terminal.onResize(({ rows, cols }) => { if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ resize: [rows, cols] })); });
    return () => { socket.onclose = null; socket.close(); };
  };
  return html`<${Reopened} vm=${vm} possible=${running} connect=${connect} label=${`Terminal in ${vm.name}`}
    why=${`A shell can be opened while ${vm.name} runs; it is ${vm.status}.`}/>`;
}

export function Console({ vm }) {
  const up = ["starting", "running", "paused", "stopping"].includes(vm.status);
  const connect = async (terminal, report) => {
    const socket = await client.socket(path`ws/v1/vms/${vm.name}/console`, { query: { write: true, take: true, tail: 200 }, project: named(vm.project) });
    socket.onopen = () => report({ text: "The serial console: press Enter for a shell. You have the keyboard." });
    socket.onmessage = ({ data }) => terminal.write(data instanceof ArrayBuffer ? new Uint8Array(data) : `\r\n[${clean(data)}]\r\n`);
    socket.onclose = ({ code, reason }) => report({ text: reason || `The console has closed (${code}).`, over: true });
    terminal.onData((text) => { if (socket.readyState === WebSocket.OPEN) socket.send(new TextEncoder().encode(text)); });
    return () => { socket.onclose = null; socket.close(); };
  };
  return html`<${Reopened} vm=${vm} possible=${up} connect=${connect} label=${`Serial console of ${vm.name}`}
    why=${`The console is there while ${vm.name} has a process; it is ${vm.status}.`}/>`;
}
