/** Files of a guest: a directory, and small texts to read and to change. */
import { useEffect, useState } from "preact/hooks";
import { client, named } from "../store.js";
import { path } from "../api.js";
import { atMost, save as saveFile } from "../bodies.js";
import { FormDialog, Problem, Said, Time, ask, bytes, clean, complain, go, html, notify, route, toVm } from "../ui.js";

/** Prints size, time, mode in hexadecimal digits and name of all in a directory. In one process: a guest may be slow. */
const LIST = ["sh", "-c", "cd -- \"$1\" && stat -c '%s %Y %f %n' -- * .[!.]* ..?* 2>/dev/null; [ -d \"$1\" ]", "sh"];
const ENTRY = /^(\d+) (\d+) ([0-9a-f]+) (.*)$/;
const SHOWN = 1000;
const EDITABLE = 256 * 1024;
/** Bytes of a list, some fifty thousand names. */
const LISTED = 8 * 1024 * 1024;
/** The last time that a `Date` can hold: a guest may say any number. */
const LAST_MS = 8.64e15;
const [TYPE, DIRECTORY, LINK, FILE] = [0xf000, 0x4000, 0xa000, 0x8000];

/** Runs a command in the guest; returns what it printed. @throws {Error} it failed. */
async function output(vm, command) {
  const answer = await client.send("POST", path`api/v1/vms/${vm.name}/agent/v1/exec`, { body: { command }, project: named(vm.project) });
  const body = await atMost(LISTED, answer);
  if (!body) throw new Error("there is too much in it to be listed");
  const decoder = new TextDecoder();
  let text = "";
  let end = {};
  for (const line of (await body.text()).split("\n").filter(Boolean)) {
    const piece = JSON.parse(line);
    if (piece.stream === "stdout") text += decoder.decode(Uint8Array.from(atob(piece.data), (one) => one.charCodeAt(0)), { stream: true });
    else if (!piece.stream) end = piece;
  }
  if (end.error) throw new Error(end.error);
  if (end.exit_code) throw new Error("there is no such directory, or it can't be read");
  return text;
}

async function list(vm, directory) {
  const found = [];
  for (const line of (await output(vm, [...LIST, directory])).split("\n")) {
    const entry = ENTRY.exec(line);
    // A name may have line ends in it.
    if (!entry) { if (found.length && line) found.at(-1).name += `\n${line}`; continue; }
    const type = Number.parseInt(entry[3], 16) & TYPE;
    found.push({ size: Number(entry[1]), changed: new Date(Math.min(1000 * entry[2], LAST_MS)).toISOString(), name: entry[4], type });
  }
  return found.sort((one, other) => (other.type === DIRECTORY) - (one.type === DIRECTORY) || one.name.localeCompare(other.name));
}

const join = (directory, name) => `${directory === "/" ? "" : directory}/${name}`;
const addressOf = (vm, file) => `${path`api/v1/vms/${vm.name}/agent/v1/files`}${file.split("/").map(encodeURIComponent).join("/")}`;

export function Files({ vm }) {
  const directory = route.value.query.path || "/";
  const [found, setFound] = useState(null);
  const [problem, setProblem] = useState(null);
  const [open, setOpen] = useState(null);
  const [round, setRound] = useState(0);
  const options = { project: named(vm.project), patience: 0 };
  useEffect(() => {
    let over = false;
    list(vm, directory).then((entries) => { if (!over) { setFound(entries); setProblem(null); } }, (error) => { if (!over) { setFound([]); setProblem(error); } });
    return () => { over = true; };
  }, [directory, round, vm.id]);
  if (vm.status !== "running") return html`<p class="quiet">Files can be read while ${vm.name} runs; it is ${vm.status}.</p>`;
  const again = () => setRound(round + 1);
  const enter = (place) => { setFound(null); setOpen(null); go(`${toVm(vm, "files")}?${new URLSearchParams({ path: place })}`); };
  const save = async (name) => {
    try {
      const answer = await client.send("GET", addressOf(vm, join(directory, name)), options);
      saveFile(await answer.blob(), name);
    } catch (error) {
      complain(error);
    }
  };
  const read = async (entry) => {
    if (entry.size > EDITABLE) return save(entry.name);
    try {
      const answer = await client.send("GET", addressOf(vm, join(directory, entry.name)), options);
      // A link leads to a file of another size.
      const body = await atMost(EDITABLE, answer);
      if (!body) return save(entry.name);
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await body.arrayBuffer());
      setOpen({ file: join(directory, entry.name), text });
    } catch (error) {
      // What is no text is for other programs.
      if (error instanceof TypeError) await save(entry.name);
      else complain(error);
    }
    return undefined;
  };
  const upload = async (event) => {
    for (const file of event.target.files) {
      try {
        await client.send("PUT", addressOf(vm, join(directory, file.name)), { ...options, body: file, headers: { "Content-Type": "application/octet-stream" } });
        notify(`${file.name} is in ${directory}`);
      } catch (error) {
        complain(error);
      }
    }
    event.target.value = "";
    again();
  };
  const steps = directory.split("/").filter(Boolean);
  return html`<div class="tools"><nav class="steps mono" aria-label="Path"><a href=${`${toVm(vm, "files")}`} onClick=${(event) => { event.preventDefault(); enter("/"); }}>/</a>
      ${steps.map((step, at) => html`<button class="plain mono" onClick=${() => enter(`/${steps.slice(0, at + 1).join("/")}`)}><${Said}>${step}<//></button><span class="quiet">${at < steps.length - 1 ? "/" : ""}</span>`)}</nav>
      <span style="flex: 1"></span><button onClick=${again}>Read again</button>
      <label class="button">Upload…<input type="file" multiple class="hidden" onChange=${upload}/></label></div>
    <${Problem} of=${problem}/>
    ${open && html`<${Editor} key=${open.file} vm=${vm} file=${open.file} text=${open.text} close=${() => { setOpen(null); again(); }}/>`}
    ${!found && html`<p class="quiet" role="status">Reading…</p>`}
    ${found?.length === 0 && !problem && html`<p class="quiet">It is empty.</p>`}
    ${found?.length > 0 && html`<div class="panel scroll-x" style="padding: 6px 6px 0" tabindex="0" role="region" aria-label="Files"><table><thead><tr><th>Name</th><th class="right">Size</th><th class="narrow">Changed</th><th><span class="hidden">Actions</span></th></tr></thead>
      <tbody>${found.slice(0, SHOWN).map((entry) => html`<tr key=${entry.name}><td class="mono">${entry.type === DIRECTORY || entry.type === LINK
        ? html`<button class="plain link mono" onClick=${() => (entry.type === LINK ? follow(vm, join(directory, entry.name), enter, () => read(entry)) : enter(join(directory, entry.name)))}><${Said}>${entry.name}<//>${entry.type === DIRECTORY ? "/" : " →"}</button>`
        : entry.type === FILE ? html`<button class="plain link mono" onClick=${() => read(entry)}><${Said}>${entry.name}<//></button>` : html`<${Said}>${entry.name}<//>`}</td>
        <td class="right">${entry.type === FILE ? bytes(entry.size) : ""}</td><td class="narrow quiet"><${Time} at=${entry.changed}/></td>
        <td class="narrow right"><div class="row" style="flex-wrap: nowrap; justify-content: end">${entry.type === FILE && html`<button onClick=${() => save(entry.name)}>Download</button>`}
          <button class="danger" onClick=${() => askDelete(vm, join(directory, entry.name), entry.type === DIRECTORY, again)}>Delete…</button></div></td></tr>`)}</tbody></table></div>
      ${found.length > SHOWN && html`<p class="quiet">and ${found.length - SHOWN} more</p>`}`}`;
}

/** Opens what a link leads to. */
async function follow(vm, file, enter, read) {
  const isDirectory = await output(vm, ["sh", "-c", "[ -d \"$1\" ]", "sh", file]).then(() => true, () => false);
  return isDirectory ? enter(file) : read();
}

function Editor({ vm, file, text, close }) {
  const [now, setNow] = useState(text);
  const save = async () => {
    try {
      await client.send("PUT", addressOf(vm, file), { project: named(vm.project), body: new Blob([now]), headers: { "Content-Type": "application/octet-stream" } });
      notify(`${file} is saved`);
      close();
    } catch (error) {
      complain(error);
    }
  };
  return html`<section class="panel" style="margin-bottom: 12px"><div class="row" style="margin-bottom: 8px"><h2 class="mono" style="flex: 1; margin: 0"><${Said}>${file}<//></h2>
      <button class="first" disabled=${now === text} onClick=${save}>Save</button><button onClick=${close}>Close</button></div>
    <textarea aria-label=${`Text of ${clean(file)}`} style="min-height: 320px" spellcheck=${false} value=${now} onInput=${(event) => setNow(event.target.value)}></textarea></section>`;
}

function askDelete(vm, file, isDirectory, done) {
  ask((close) => html`<${FormDialog} title=${`Delete ${clean(file)}?`} action="Delete" danger close=${close} act=${async () => {
    await client.send("DELETE", addressOf(vm, file), { query: { recursive: isDirectory ? true : undefined }, project: named(vm.project) });
    notify(`${file} is deleted`);
    done();
  }}><p>${isDirectory ? "With all that is in it." : "In the guest; a link itself, not what it leads to."}</p><//>`);
}
