/** The browser in a VM, live: its pages as pictures, driven with the reader's mouse and keyboard over DevTools. */
import { useEffect, useRef, useState } from "preact/hooks";
import { client, named } from "../store.js";
import { path } from "../api.js";
import { Problem, Said, clean, complain, html } from "../ui.js";

const TABS_MS = 2000;
/** A page can open others without end. */
const SHOWN = 100;
/** The first answer may have to wait for a browser that is starting. */
const WAIT_MS = 70_000;
const QUALITY = 75;
const BUTTONS = ["left", "middle", "right", "back", "forward"];
/** Those of the reader's own browser, which it needs to leave. */
const OWN_KEYS = new Set(["F5", "F11", "F12"]);

const ENTITIES = { lt: "<", gt: ">", amp: "&", quot: "\"", "#39": "'" };
/** Returns a title as its page has it: the browser's list has it escaped for HTML. */
const plainTitle = (title) => String(title ?? "").replace(/&(lt|gt|amp|quot|#39);/g, (_, name) => ENTITIES[name]);

export function Browser({ vm }) {
  const [tabs, setTabs] = useState(null);
  const [chosen, setChosen] = useState(null);
  const [problem, setProblem] = useState(null);
  const options = { project: named(vm.project), patience: WAIT_MS };
  const list = async () => {
    try {
      const found = await client.get(path`ws/v1/vms/${vm.name}/devtools/json/list`, options);
      setTabs(found.filter((tab) => tab.type === "page").slice(0, SHOWN).map((tab) => ({ ...tab, title: plainTitle(tab.title) })));
      setProblem(null);
    } catch (error) {
      setProblem(error);
    }
  };
  useEffect(() => {
    let timer;
    let over = false;
    const again = async () => {
      if (!document.hidden) await list();
      if (!over) timer = setTimeout(again, TABS_MS);
    };
    again();
    return () => { over = true; clearTimeout(timer); };
  }, []);
  const tab = tabs?.find((one) => one.id === chosen) ?? tabs?.[0];
  const ask = (method, what) => client.send(method, `${path`ws/v1/vms/${vm.name}/devtools`}/json/${what}`, options).then(list, complain);
  if (problem && !tabs) return html`<${Problem} of=${problem}/>`;
  if (!tabs) return html`<p class="quiet" role="status">Waiting for the browser…</p>`;
  return html`<div class="sheet">
    <div class="pages" role="group" aria-label="Pages of the browser">${tabs.map((one) => html`<span key=${one.id} class=${`page-tab ${one === tab ? "on" : ""}`}>
      <button class="plain" aria-pressed=${one === tab} title=${clean(one.url)} onClick=${() => setChosen(one.id)}><${Said}>${one.title || one.url || "New page"}<//></button>
      <button class="plain" aria-label=${`Close ${clean(one.title || one.url)}`} onClick=${() => ask("GET", `close/${encodeURIComponent(one.id)}`)}>✕</button></span>`)}
      <button class="plain" aria-label="New page" onClick=${() => ask("PUT", "new?about:blank")}>+</button></div>
    ${tab ? html`<${Page} key=${tab.id} vm=${vm} target=${tab.id}/>` : html`<p class="quiet">It has no page open.</p>`}</div>`;
}

/** One connection to a page of the browser. */
class DevTools {
  #number = 0;
  #waiting = new Map();
  #socket;

  constructor(socket, onEvent, onClose) {
    this.#socket = socket;
    socket.onmessage = ({ data }) => {
      const message = JSON.parse(data);
      if (message.id === undefined) return onEvent(message.method, message.params);
      const answer = this.#waiting.get(message.id);
      this.#waiting.delete(message.id);
      return message.error ? answer?.reject(new Error(String(message.error.message))) : answer?.resolve(message.result);
    };
    socket.onclose = ({ reason }) => onClose(reason || "The page is gone, or its browser.");
  }

  /** Sends a command; resolves with its result. */
  ask(method, params = {}) {
    return new Promise((resolve, reject) => {
      const id = ++this.#number;
      this.#waiting.set(id, { resolve, reject });
      this.send(method, params, id);
    });
  }

  /** Sends a command whose result is of no interest. */
  send(method, params = {}, id = ++this.#number) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify({ id, method, params }));
  }

  close() {
    this.#socket.onclose = null;
    this.#socket.close();
  }
}

function Page({ vm, target }) {
  const picture = useRef(null);
  const tools = useRef(null);
  const frame = useRef(null);
  const field = useRef(null);
  const [address, setAddress] = useState("");
  const [ended, setEnded] = useState(null);
  const [connected, setConnected] = useState(false);
  const [seen, setSeen] = useState(false);
  const [round, setRound] = useState(0);

  // Not while somebody types another one.
  const show = (url) => { if (document.activeElement !== field.current) setAddress(url); };
  useEffect(() => {
    let over = false;
    const start = async () => {
      const socket = await client.socket(path`ws/v1/vms/${vm.name}/devtools/page/${target}`, { project: named(vm.project) });
      if (over) return socket.close();
      const made = new DevTools(socket, (method, params) => {
        if (method === "Page.screencastFrame") {
          frame.current = params.metadata;
          if (picture.current) picture.current.src = `data:image/jpeg;base64,${params.data}`;
          setSeen(true);
          made.send("Page.screencastFrameAck", { sessionId: params.sessionId });
        } else if (method === "Page.frameNavigated" && !params.frame.parentId) {
          show(params.frame.url);
        }
      }, (reason) => { if (!over) { setEnded(reason); setConnected(false); } });
      socket.onopen = async () => {
        tools.current = made;
        setConnected(true);
        made.send("Page.enable");
        const scale = Math.min(2, devicePixelRatio);
        made.send("Page.startScreencast", { format: "jpeg", quality: QUALITY, maxWidth: Math.round(1280 * scale), maxHeight: Math.round(1600 * scale) });
        const history = await made.ask("Page.getNavigationHistory").catch(() => null);
        if (history) show(history.entries[history.currentIndex]?.url ?? "");
      };
      return undefined;
    };
    setEnded(null);
    start().catch((error) => setEnded(error.message));
    return () => { over = true; tools.current?.close(); tools.current = null; };
  }, [round]);

  const place = (event) => {
    const box = picture.current.getBoundingClientRect();
    const { deviceWidth, deviceHeight } = frame.current ?? { deviceWidth: box.width, deviceHeight: box.height };
    return { x: ((event.clientX - box.left) / box.width) * deviceWidth, y: ((event.clientY - box.top) / box.height) * deviceHeight };
  };
  const modifiers = (event) => (event.altKey ? 1 : 0) | (event.ctrlKey ? 2 : 0) | (event.metaKey ? 4 : 0) | (event.shiftKey ? 8 : 0);
  const mouse = (type) => (event) => {
    if (!tools.current || !frame.current) return;
    if (type === "mousePressed") {
      event.currentTarget.focus({ preventScroll: true });
      event.currentTarget.setPointerCapture(event.pointerId);
    }
    if (type !== "mouseMoved") event.preventDefault();
    tools.current.send("Input.dispatchMouseEvent", {
      type, ...place(event), modifiers: modifiers(event), button: type === "mouseMoved" && !event.buttons ? "none" : BUTTONS[Math.max(0, event.button)],
      buttons: event.buttons, clickCount: type === "mouseMoved" ? 0 : Math.max(1, event.detail),
    });
  };
  const wheel = (event) => {
    if (!tools.current || !frame.current) return;
    event.preventDefault();
    tools.current.send("Input.dispatchMouseEvent", { type: "mouseWheel", ...place(event), modifiers: modifiers(event), deltaX: event.deltaX, deltaY: event.deltaY });
  };
  const key = (type) => (event) => {
    // Tab leaves with Shift-Escape, as everything has to be reachable with a keyboard alone.
    if (event.key === "Escape" && event.shiftKey) {
      event.currentTarget.blur();
      return;
    }
    if (!tools.current || OWN_KEYS.has(event.key) || event.isComposing) return;
    event.preventDefault();
    const text = event.key === "Enter" ? "\r" : event.key.length === 1 && !event.ctrlKey && !event.metaKey ? event.key : "";
    tools.current.send("Input.dispatchKeyEvent", {
      type: type === "keyDown" && !text ? "rawKeyDown" : type, modifiers: modifiers(event), key: event.key, code: event.code, windowsVirtualKeyCode: event.keyCode,
      ...(type === "keyDown" && text ? { text, unmodifiedText: text } : {}), autoRepeat: event.repeat,
    });
  };
  const paste = (event) => {
    event.preventDefault();
    tools.current?.send("Input.insertText", { text: event.clipboardData.getData("text/plain") });
  };
  const step = async (by) => {
    const history = await tools.current?.ask("Page.getNavigationHistory");
    const entry = history?.entries[history.currentIndex + by];
    if (entry) tools.current.send("Page.navigateToHistoryEntry", { entryId: entry.id });
  };
  const navigate = async (event) => {
    event.preventDefault();
    const text = field.current.value.trim();
    const url = /^[a-z][a-z0-9+.-]*:/i.test(text) && !/^localhost:/i.test(text) ? text : `${/^(localhost|127\.)/.test(text) ? "http" : "https"}://${text}`;
    const answer = await tools.current?.ask("Page.navigate", { url }).catch((error) => ({ errorText: error.message }));
    if (answer?.errorText) complain({ message: `The browser can't open it: ${answer.errorText}` });
    picture.current?.focus();
  };
  return html`<form class="row address" onSubmit=${navigate}>
      <button type="button" class="plain" aria-label="Back" onClick=${() => step(-1).catch(complain)}>←</button>
      <button type="button" class="plain" aria-label="Forward" onClick=${() => step(1).catch(complain)}>→</button>
      <button type="button" class="plain" aria-label="Reload" onClick=${() => tools.current?.send("Page.reload")}>↻</button>
      <input ref=${field} name="address" aria-label="Address" autocomplete="off" spellcheck=${false} disabled=${!connected} value=${address} onInput=${(event) => setAddress(event.target.value)}/></form>
    ${ended && html`<p class="note"><${Said}>${ended}<//> <button onClick=${() => setRound(round + 1)}>Connect again</button></p>`}
    ${!seen && !ended && html`<p class="quiet" role="status">Waiting for a picture…</p>`}
    <div class="screen"><img ref=${picture} hidden=${!seen} alt="The page, live. Click it to use mouse and keyboard; Shift-Escape leaves." tabindex="0" draggable=${false}
      onPointerDown=${mouse("mousePressed")} onPointerUp=${mouse("mouseReleased")} onPointerMove=${mouse("mouseMoved")} onWheel=${wheel}
      onKeyDown=${key("keyDown")} onKeyUp=${key("keyUp")} onPaste=${paste} onContextMenu=${(event) => event.preventDefault()}/></div>`;
}
