/** The log of a VM: the last lines, then each as it comes; with search, and without what a terminal would obey. */
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { client, named } from "../store.js";
import { path } from "../api.js";
import { save } from "../bodies.js";
import { Time, clean, complain, html, plain, useWindow } from "../ui.js";

const LINE = 19;
const KEPT = 20_000;
const TAIL = 2000;
const STREAMS = ["stdout", "stderr", "console"];
const MAX_LINE = 4000;

export function Log({ vm }) {
  const lines = useRef([]);
  const [version, setVersion] = useState(0);
  const [state, setState] = useState("connecting");
  const [search, setSearch] = useState("");
  const [stream, setStream] = useState("");
  const [follow, setFollow] = useState(true);

  useEffect(() => {
    let socket;
    let over = false;
    let timer;
    let pause = 250;
    let dirty = false;
    const show = () => {
      if (!dirty) { dirty = true; requestAnimationFrame(() => { dirty = false; setVersion((before) => before + 1); }); }
    };
    const open = async () => {
      const last = lines.current.findLast((line) => line.seq !== undefined);
      try {
        socket = await client.socket(path`ws/v1/vms/${vm.name}/logs`, { query: last ? { since: last.seq } : { tail: TAIL }, project: named(vm.project) });
      } catch {
        return again();
      }
      if (over) return socket.close();
      socket.onopen = () => { pause = 250; setState("live"); };
      socket.onmessage = ({ data }) => {
        lines.current.push(JSON.parse(data));
        if (lines.current.length > KEPT * 1.1) lines.current.splice(0, lines.current.length - KEPT);
        show();
      };
      socket.onclose = ({ code }) => (code === 1000 ? setState("ended") : again());
      return undefined;
    };
    const again = () => {
      if (over) return;
      setState("lost");
      timer = setTimeout(open, pause * (0.5 + Math.random() / 2));
      pause = Math.min(2 * pause, 5000);
    };
    open();
    return () => { over = true; clearTimeout(timer); socket?.close(); };
  }, [vm.id]);

  const wanted = search.toLowerCase();
  const found = useMemo(() => (wanted || stream ? lines.current.filter((line) => line.gap
    || ((!stream || line.stream === stream) && (!wanted || plain(line.line).toLowerCase().includes(wanted)))) : lines.current.slice()), [version, wanted, stream]);
  const [body, first, last] = useWindow(found.length, LINE, 20);
  useEffect(() => {
    if (follow && body.current) body.current.scrollTop = body.current.scrollHeight;
  }, [found, follow]);
  const onScroll = () => {
    const { scrollTop, scrollHeight, clientHeight } = body.current;
    const atEnd = scrollHeight - scrollTop - clientHeight < 2 * LINE;
    if (atEnd !== follow) setFollow(atEnd);
  };
  const download = async () => {
    try {
      const answer = await client.send("GET", path`api/v1/vms/${vm.name}/logs`, { project: named(vm.project), patience: 0 });
      save(await answer.blob(), `${vm.name}.log.ndjson`);
    } catch (error) {
      complain(error);
    }
  };
  return html`<div class="tools"><input type="search" aria-label="Search the log" placeholder="Search the log" value=${search} onInput=${(event) => setSearch(event.target.value)}/>
      <select aria-label="Stream" value=${stream} onChange=${(event) => setStream(event.target.value)}><option value="">All streams</option>${STREAMS.map((one) => html`<option>${one}</option>`)}</select>
      <label class="check"><input type="checkbox" checked=${follow} onChange=${(event) => setFollow(event.target.checked)}/>Follow</label>
      <button onClick=${download}>Download</button>
      <span class="quiet num">${wanted || stream ? `${found.length} of ${lines.current.length} lines` : `${found.length} ${found.length === 1 ? "line" : "lines"}`}</span>
      ${state === "lost" && html`<span class="state lost">Reconnecting…</span>`}</div>
    ${!found.length && html`<p class="quiet" role="status">${lines.current.length ? "No line has that." : state === "connecting" ? "Reading…" : "It has printed nothing yet. What its console and its workload print appears here."}</p>`}
    <div class="log" ref=${body} onScroll=${onScroll} tabindex="0" role="log" aria-label=${`Log of ${vm.name}`} aria-live="off">
      <div style=${`height: ${found.length * LINE}px`}></div>
      ${found.slice(first, last).map((line, index) => html`<${Line} key=${first + index} line=${line} top=${(first + index) * LINE} wanted=${wanted}/>`)}</div>`;
}

function Line({ line, top, wanted }) {
  if (line.gap) {
    return html`<div class="line gap" style=${`top: ${top}px`}>Lines ${line.gap.from} to ${line.gap.to} are not kept any more</div>`;
  }
  const text = plain(line.line.slice(0, MAX_LINE));
  return html`<div class=${`line ${clean(line.stream)}`} style=${`top: ${top}px`}><span class="at"><${Time} at=${line.timestamp}/></span>
    <span class="from">${clean(line.stream)}</span><span class="text">${wanted ? marked(text, wanted) : text}</span></div>`;
}

function marked(text, wanted) {
  const parts = [];
  const lower = text.toLowerCase();
  let at = 0;
  for (let next = lower.indexOf(wanted); next >= 0 && parts.length < 40; next = lower.indexOf(wanted, at)) {
    parts.push(text.slice(at, next), html`<mark>${text.slice(next, next + wanted.length)}</mark>`);
    at = next + wanted.length;
  }
  return [...parts, text.slice(at)];
}
