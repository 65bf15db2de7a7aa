/** The frame around all views: navigation, whether the page is current, signing in, keys, the command palette. */
import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { connection, fleet, gaps, lostAt, may, revision, session, signedOut, signOut, start, vms } from "./store.js";
import { Mark, Notices, Time, ask, asked, clean, complain, go, html, route, to } from "./ui.js";
import { Palette } from "./palette.js";
import { Overview } from "./views/overview.js";
import { Vms } from "./views/vms.js";
import { Vm } from "./views/vm.js";
import { Create } from "./views/create.js";
import { Forks } from "./views/forks.js";
import { Tree } from "./views/tree.js";
import { Resource, RESOURCES, isShown } from "./views/resources.js";
import { SignIn } from "./views/sign-in.js";

function Live() {
  const text = { connecting: "Connecting…", live: "Live", lost: "Disconnected" }[connection.value];
  return html`<span class="live" role="status"><span class="state ${connection.value}">${text}</span></span>`;
}

function Banners() {
  const [seen, setSeen] = useState(0);
  return html`
    ${connection.value === "lost" && html`<div class="banner bad" role="alert">
      The daemon can't be reached${lostAt.value && html`, since <${Time} at=${lostAt.value.toISOString()}/>`}.
      What you see may be out of date. The page goes on by itself when the daemon is back.</div>`}
    ${fleet.value?.unreachable.length > 0 && html`<div class="banner bad" role="alert"><span>${clean(fleet.value.unreachable.join(", "))} ${fleet.value.unreachable.length === 1 ? "gives" : "give"} no sign of life.
      VMs there are shown as last reported; they may still run. <a href=${to("hosts")}>Show the hosts</a></span></div>`}
    ${gaps.value > seen && html`<div class="banner" role="alert">
      Some events were missed, as the daemon no longer has them. All VMs were read again.
      <button onClick=${() => setSeen(gaps.value)}>OK</button></div>`}`;
}

function Who() {
  const [open, setOpen] = useState(false);
  const box = useRef(null);
  useEffect(() => {
    if (!open) return undefined;
    const close = (event) => {
      if (event.key === "Escape" || (event.type === "pointerdown" && !box.current.contains(event.target))) setOpen(false);
    };
    addEventListener("keydown", close);
    addEventListener("pointerdown", close);
    return () => { removeEventListener("keydown", close); removeEventListener("pointerdown", close); };
  }, [open]);
  const { caller, role, project, signed_in: signedIn, expires_at: expires } = session.value;
  const name = caller === "anonymous" ? "No key in force" : clean(caller);
  return html`<div class="menu" ref=${box}>
    <button class="plain" aria-expanded=${open} onClick=${() => setOpen(!open)}>${name}</button>
    ${open && html`<div><p><b>${name}</b><br/><span class="quiet">Role ${role}${project ? `, project ${project}` : ", all projects"}</span></p>
      ${expires && html`<p class="quiet">Session until <${Time} at=${expires}/></p>`}
      ${signedIn ? html`<button onClick=${() => signOut().catch(complain)}>Sign out</button>`
        : html`<p class="quiet">Everybody who reaches this address may do everything. <code>volar keys create</code> changes that.</p>`}</div>`}
  </div>`;
}

function Nav() {
  const [first = "overview"] = route.value.parts;
  const here = first === "projects" || first === "create" ? "vms" : first;
  const link = (place, text, more) => html`<a href=${to(place)} aria-current=${here === place ? "page" : null}>${text}${more}</a>`;
  revision.value;
  const shown = Object.entries(RESOURCES).filter(([, resource]) => isShown(resource));
  return html`<nav class="nav" aria-label="Views">
    ${link("overview", "Overview")}
    ${link("vms", "VMs", html`<span class="quiet num">${vms.size || ""}</span>`)}
    ${link("forks", "Forks")}
    <div class="group">Stock</div>
    ${shown.filter(([, resource]) => !resource.host).map(([place, resource]) => link(place, resource.title))}
    ${may("admin") && html`<div class="group">Host</div>${link("tree", "Supervisor tree")}`}
    ${shown.filter(([, resource]) => resource.host).map(([place, resource]) => link(place, resource.title))}
  </nav>`;
}

function View() {
  const { parts } = route.value;
  const [place = "overview", ...rest] = parts;
  if (place === "overview") return html`<${Overview}/>`;
  if (place === "create") return html`<${Create} key=${location.hash}/>`;
  if (place === "vms" && !rest.length) return html`<${Vms}/>`;
  if (place === "vms") return html`<${Vm} key=${rest[0]} project=${session.value.project ?? "default"} name=${rest[0]} tab=${rest[1]}/>`;
  if (place === "projects" && rest[1] === "vms" && rest[2]) {
    return html`<${Vm} key=${`${rest[0]}/${rest[2]}`} project=${rest[0]} name=${rest[2]} tab=${rest[3]}/>`;
  }
  if (place === "forks") return html`<${Forks}/>`;
  if (place === "tree" && may("admin")) return html`<${Tree}/>`;
  if (RESOURCES[place]) return html`<${Resource} key=${place} of=${place}/>`;
  return html`<main class="main"><div class="empty"><h2>There is no such view</h2>
    <p>The address may be of another version. <a href=${to("overview")}>Go to the overview</a>.</p></div></main>`;
}

function App() {
  useEffect(() => {
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
  if (session.value === null) {
    return html`<div class="sign-in"><div class="brand"><${Mark}/>Volant</div><p class="quiet" role="status">
      ${connection.value === "lost" ? "The daemon can't be reached. Trying again…" : "Connecting…"}</p></div>`;
  }
  if (session.value === false) return html`<${SignIn} mark=${html`<${Mark}/>`} why=${signedOut.value}/><${Notices}/>`;
  const dialog = asked.value;
  return html`<div class="shell">
    <header class="top">
      <a class="brand" href=${to("overview")}><${Mark}/>Volant</a>
      <span class="space"></span>
      <${Live}/>
      <button class="plain wide-only" onClick=${palette}>Commands <kbd>Ctrl K</kbd></button>
      <${Who}/>
    </header>
    <${Nav}/>
    <div class="page">
      <div><${Banners}/></div><${View}/>
    </div></div>
    ${dialog && html`<div key=${dialog}>${dialog(() => { if (asked.value === dialog) ask(null); })}</div>`}<${Notices}/>`;
}

const palette = () => ask((close) => html`<${Palette} close=${close}/>`);

/** Keys that work in all views, unless somebody types. */
function onKey(event) {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k" && session.value) {
    if (event.target.closest?.(".term")) return;
    event.preventDefault();
    palette();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || asked.value || !session.value) return;
  if (event.target.closest?.("input, textarea, select, .term, [contenteditable]")) return;
  if (event.key === "/") {
    const field = document.querySelector("input[type=search]");
    if (field) { event.preventDefault(); field.focus(); } else { go(to("vms")); }
  } else if (event.key === "c" && may("control")) {
    event.preventDefault();
    go(to("create"));
  } else if (event.key === "?") {
    palette();
  }
}

document.title = "Volant";
render(html`<${App}/>`, document.getElementById("app"));
start();
