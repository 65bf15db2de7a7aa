// People at the console, in Chromium: SCENARIO URL [ARGUMENT…]. Prints JSON lines: what it saw, and `{"do": …}` where it
// waits until the test has done that and answers with a line.
import { createInterface } from "node:readline";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const [scenario, base, ...rest] = process.argv.slice(2);
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const PATIENCE_MS = 60_000;

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const say = (value) => console.log(JSON.stringify(value));
async function ask(what) {
  say({ do: what });
  return JSON.parse((await lines.next()).value);
}

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
const problems = [];

async function open({ beside = null, ...options } = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, reducedMotion: "reduce", ...options });
  context.setDefaultTimeout(PATIENCE_MS);
  await context.addInitScript(() => {
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (event) => violations.push(`${event.violatedDirective} ${event.blockedURI}`));
    window.coloured = (canvas) => {
      const { data } = canvas?.getContext("2d").getImageData(0, 0, canvas.width, canvas.height) ?? { data: [] };
      for (let at = 0; at < data.length; at += 4) if (data[at + 3] > 100 && Math.max(data[at], data[at + 1], data[at + 2]) - Math.min(data[at], data[at + 1], data[at + 2]) > 60) return true;
      return false;
    };
    window.longest = 0;
    new PerformanceObserver((list) => { for (const task of list.getEntries()) longest = Math.max(longest, task.duration); }).observe({ type: "longtask", buffered: true });
  });
  return watched(await context.newPage(), beside);
}

/** Reports the errors and the foreign requests of a page. `beside`: another site, whose pages may request what they like. */
function watched(page, beside = null) {
  page.on("pageerror", (error) => problems.push(String(error.stack)));
  page.on("dialog", (dialog) => { problems.push(`a dialog: ${dialog.message()}`); dialog.dismiss(); });
  page.on("request", (request) => {
    if (beside && [page.url(), request.url()].some((one) => one.startsWith(beside))) return;
    if (!request.url().startsWith(base) && !/^(blob|data|about):/.test(request.url())) problems.push(`a request to ${request.url()}`);
  });
  return page;
}

/** Reports what the page did that it must not. */
async function checked(page, where) {
  problems.push(...(await page.evaluate(() => [...violations, ...(window.executed ? [`executed: ${executed}`] : [])])));
  const over = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  if (over > 0) problems.push(`${where} is wider than its window by ${over}`);
}

/** Looks for what keeps people with disabilities out; of the dark colours, whether they can be read. */
async function accessible(page, where) {
  const client = await page.context().newCDPSession(page);
  const evaluate = (expression) => client.send("Runtime.evaluate", { expression, awaitPromise: true, returnByValue: true });
  // From outside of the page, whose policy forbids it.
  await evaluate(`window.axe || (() => { ${AXE} })(); 0`);
  for (const [colorScheme, rules] of [["light", {}], ["dark", { runOnly: ["color-contrast"] }]]) {
    await page.emulateMedia({ colorScheme });
    const options = JSON.stringify({ resultTypes: ["violations"], ...rules });
    const { result } = await evaluate(`axe.run({ exclude: [".xterm"] }, ${options}).then((found) =>
      found.violations.map((one) => [one.id, one.nodes.map((node) => node.target.join(" ") + ": " + node.failureSummary)]))`);
    for (const [rule, nodes] of result.value) problems.push(`${where}, ${colorScheme}: ${rule}: ${nodes.slice(0, 2).join("; ")}`);
  }
  await client.detach();
  await page.emulateMedia({ colorScheme: "light" });
}

/** What views show at the end of the walk, which has left three VMs. With `|`: one of them, as the cache may be a shared one. */
const VIEWS = {
  overview: ["3 VMs 3 running 0 crashed", "Daemon ok", "vCPUs, 384 MiB", "walker deleted"], vms: ["walker-fork-1", "walker-fork-3", "again", "1 × 128 MiB"],
  tree: ["volantd", "journal", "walker-fork-3", "restarts in"], snapshots: ["kept walker ready 128 MiB", "New VM…"], images: ["No images yet|Used by"],
  templates: ["No templates yet|Clones"], volumes: ["data ready 16 MiB", "– nothing", "Delete…"], networks: ["back", "Age"], secrets: ["No secrets yet", "volar secrets set"],
  plugins: ["base", "The built-in image"], projects: ["default 3 3 384 MiB"], keys: ["No key is in force"], audit: ["create_vm", "fork_vm", "walker", "done"],
};

/** Sends a request from the documentation; returns its operation there. */
async function tries(page, operation, fill = {}) {
  await page.goto(`${base}/docs#${operation}`);
  const box = page.locator(`#${operation}`);
  for (const [label, value] of Object.entries(fill)) await box.getByLabel(label, { exact: true }).fill(value);
  await box.getByRole("button", { name: "Send" }).click();
  return box;
}

/** Reports cells without a column, and text that only a bug writes. */
async function whole(page, where) {
  const [rows, text] = await page.evaluate(() => [[...document.querySelectorAll(".main table:has(thead)")].flatMap((table) => [...table.rows].map((row) => row.cells.length)), document.querySelector(".main").innerText]);
  if (new Set(rows).size > 1) problems.push(`${where} has rows of ${rows} cells`);
  const odd = /\bundefined\b|\bNaN\b|Invalid Date|\[object /.exec(text);
  if (odd) problems.push(`${where} shows ${odd[0]}`);
}

/** How many lines of a life the fork tree has in each state. */
const lives = (page) => page.evaluate(() => Object.fromEntries(["running", "kept", "gone"].map((state) => [state, document.querySelectorAll(`.life.${state}`).length])));

/** Waits until a view shows all of these texts; says which it does not. */
async function shows(page, where, texts) {
  const missing = () => page.evaluate((wanted) => {
    const text = document.querySelector(".main")?.innerText.replace(/\s+/g, " ") ?? "";
    return wanted.filter((one) => !one.split("|").some((choice) => text.includes(choice)));
  }, texts);
  for (const end = Date.now() + PATIENCE_MS / 4; (await missing()).length; await page.waitForTimeout(50)) {
    if (Date.now() > end) throw new Error(`${where} does not show ${JSON.stringify(await missing())}`);
  }
}

/** Creates a VM, works in it, loses the daemon, deletes the VM, signs in and out. */
async function walk() {
  const page = await open();
  await page.goto(base);
  await page.getByRole("heading", { name: "Your first VM" }).waitFor();
  await accessible(page, "the empty overview");

  await page.keyboard.press("c");
  await page.getByRole("textbox", { name: "Name", exact: false }).first().fill("walker");
  await page.getByLabel("Memory").fill("128");
  await page.getByText("More").click();
  await page.getByLabel("Labels").fill("note=<img src=x onerror=executed=1>");
  await accessible(page, "the form");
  say({ command: await page.locator(".code pre").innerText() });
  // What no event says is read again when a request has failed.
  const asked = [];
  await page.route("**/api/v1/vms/walker", async (route) => {
    if (route.request().method() !== "GET") return route.continue();
    if (asked.push(Date.now()) <= 4) return route.abort("connectionfailed");
    // An event is committed some time after what it says was decided, so its own time is later.
    const response = await route.fetch().catch(() => null);
    if (!response) return route.abort("connectionfailed");
    const vm = await response.json();
    return route.fulfill({ response, json: vm.updated_at ? { ...vm, updated_at: new Date(Date.parse(vm.updated_at) - 1000).toISOString() } : vm });
  });
  await page.getByRole("button", { name: "Create VM" }).click();
  await page.locator(".head .state.running").waitFor();
  await page.locator(".timeline .kind.created, .timeline .kind", { hasText: "created" }).first().waitFor();
  const { user, filters, limits } = await ask("inspect");
  for (const [panel, texts] of [["sandbox", [String(user), `${filters} seccomp filter`]], ["limits", [limits?.["pids.max"] ?? "Control group none"]]]) {
    for (const text of texts) {
      await page.waitForFunction(([of, wanted]) => document.querySelector(`.panel.${of}`)?.innerText.replace(/\s+/g, " ").includes(wanted), [panel, text], { polling: 200 })
        .catch((error) => { throw new Error(`${panel} lacks ${text}; the VM was asked for at ${asked.map((at) => at - asked[0])} ms: ${error}`); });
    }
  }
  await shows(page, "a VM", ["the agent has answered", "128 MiB", "note=<img src=x onerror=executed=1>"]);
  await accessible(page, "a VM");
  // Figures over time: the second one is there, and drawn, in a colour. All else in a chart is grey.
  await page.waitForFunction(() => [...document.querySelectorAll(".charts > div")].filter((one) => /Memory.*MiB|Processor.*%|Read.*B\/s/.test(one.innerText.replace(/\s+/g, " ")) && coloured(one.querySelector("canvas"))).length === 3);
  await page.getByRole("link", { name: "How it was made" }).click();
  say({ again: await page.getByLabel("volar", { exact: true }).innerText(), origin: await page.locator(".facts").innerText() });
  await accessible(page, "how a VM was made");
  say({ running: await page.evaluate(() => performance.getEntriesByType("navigation").length) });

  await page.getByRole("link", { name: "Terminal" }).click();
  const screen = page.locator(".xterm-rows");
  await screen.waitFor();
  await page.locator(".tools", { hasText: "A shell in walker" }).waitFor();
  await page.locator(".xterm-helper-textarea").focus();
  await page.keyboard.type("echo $((6*7))-echoed; printf '<img src=x onerror=executed=2>\\033]0;title\\007\\033[31mred\\342\\200\\256\\n' >/dev/console\r");
  await screen.getByText("42-echoed").waitFor();
  await page.keyboard.type("stty size\r");
  // Before them may be the terminal's answer to the shell, which asks for the cursor's position.
  await screen.getByText(/\d+ \d{2,}$/).first().waitFor();
  await page.keyboard.type("mkdir /tmp/web; echo '<p id=p>x</p><script>document.cookie = \"own=1\"; p.textContent = \"ran \" + document.cookie + opener</script>' > /tmp/web/index.html; touch '/tmp/web/<img src=x onerror=executed=3>'; httpd -p 127.0.0.1:8080 -h /tmp/web && echo ser''ving\r");
  await screen.getByText("serving").waitFor();
  await checked(page, "the terminal");

  await page.getByRole("link", { name: "Serial console" }).click();
  // What the command has printed there is shown, and the keyboard gets there.
  await screen.getByText("red").waitFor();
  await page.locator(".tools", { hasText: "You have the keyboard" }).waitFor();
  await page.locator(".xterm-helper-textarea").focus();
  await page.keyboard.type("\recho $((5*5))-typed\r");
  await screen.getByText("25-typed").waitFor();

  await page.getByRole("link", { name: "Log", exact: true }).click();
  await page.locator(".log .line", { hasText: "onerror=executed=2>red\\u202e" }).waitFor();
  await page.getByLabel("Search the log").fill("onerror");
  await page.locator(".log mark").first().waitFor();
  await accessible(page, "the log");
  await checked(page, "the log");

  await page.goto(`${base}/#/vms/walker/files?path=/tmp/web`);
  await page.getByText("<img src=x onerror=executed=3>").waitFor();
  await page.getByRole("button", { name: "index.html" }).click();
  const text = page.getByLabel("Text of /tmp/web/index.html");
  await text.fill((await text.inputValue()).replace("ran ", "saved "));
  await accessible(page, "the files");
  await page.getByRole("button", { name: "Save" }).click();
  await text.waitFor({ state: "detached" });
  await checked(page, "the files");

  await page.getByRole("button", { name: "Snapshot…" }).click();
  await page.getByRole("dialog").getByLabel("Name").fill("kept");
  await page.getByRole("button", { name: "Take snapshot" }).click();
  await page.getByRole("dialog").waitFor({ state: "detached" });
  await page.getByRole("button", { name: "Fork" }).click();
  await page.getByLabel("Copies").fill("3");
  await page.getByRole("dialog").getByRole("button", { name: "Fork" }).click();
  await page.getByRole("dialog").waitFor({ state: "detached" });
  await page.getByRole("link", { name: "Forks" }).click();
  await page.locator(".lane .state.running").nth(3).waitFor();
  await page.locator(".lane", { hasText: "walker-fork-2" }).hover();
  await page.locator(".lane", { hasText: "walker-fork-2" }).getByRole("button", { name: "Delete" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Delete" }).click();
  await page.locator(".lane .state.gone").waitFor();
  await page.locator(".lane", { hasText: "kept" }).locator(".state.kept").waitFor();
  say({ edges: await page.locator(".life path").count(), lives: await lives(page) });
  await accessible(page, "the forks");
  await checked(page, "the forks");
  await page.goto(`${base}/#/vms/walker`);

  await page.getByRole("link", { name: "Ports" }).click();
  await page.getByLabel("Port of the guest").fill("8080");
  await accessible(page, "the ports");
  const [opened] = await Promise.all([page.waitForEvent("popup"), page.getByRole("button", { name: "Open" }).click()]);
  await opened.getByText("saved own=1null").waitFor();
  say({ opened: new URL(opened.url()).hostname });
  await opened.close();

  await ask("kill");
  await page.getByText("The daemon can't be reached").waitFor();
  await ask("start");
  await page.locator(".top .state.live").waitFor();
  say({ recovered: await page.evaluate(() => performance.getEntriesByType("navigation")[0].type) });
  await page.getByRole("button", { name: "Pause" }).click();
  await page.locator(".head .state.paused").waitFor();

  await page.keyboard.press("Control+k");
  await page.getByLabel("Search commands and VMs").fill("delete walker");
  await accessible(page, "the palette");
  await page.keyboard.press("Enter");
  await page.getByRole("dialog").getByRole("button", { name: "Delete" }).click();
  await page.getByText("There is no VM named walker").waitFor();
  await page.goto(`${base}/#/snapshots`);
  await page.getByRole("row", { name: /kept walker/ }).getByRole("button", { name: "New VM…" }).click();
  await page.getByRole("dialog").getByLabel("Name").fill("again");
  await page.getByRole("dialog").getByRole("button", { name: "Create" }).click();
  await page.locator(".head .state.running").waitFor();
  await shows(page, "a copy", ["again", "restored"]);
  await page.goto(`${base}/#/forks`);
  await page.locator(".lane", { hasText: "again" }).locator(".state.running").waitFor();
  say({ later: await lives(page) });
  for (const [view, button, fields] of [["volumes", "New volume…", { Name: "data", "Size, MiB": "16" }], ["networks", "New network…", { Name: "back" }]]) {
    await page.goto(`${base}/#/${view}`);
    await page.getByRole("button", { name: button }).click();
    for (const [label, value] of Object.entries(fields)) await page.getByRole("dialog").getByLabel(label).fill(value);
    await page.getByRole("dialog").getByRole("button", { name: "OK" }).click();
    await page.getByRole("dialog").waitFor({ state: "detached" });
  }
  for (const [view, texts] of Object.entries(VIEWS)) {
    await page.goto(`${base}/#/${view}`);
    await shows(page, view, texts);
    await whole(page, view);
    // Most are one component.
    if (["overview", "tree", "plugins", "keys", "audit"].includes(view)) await accessible(page, view);
    await checked(page, view);
  }

  // The documentation sends what it explains, and shows a stream as it comes.
  const docs = watched(await page.context().newPage());
  const made = await tries(docs, "create_network", { Body: '{"name": "<b onclick=executed=5>"}' });
  await made.getByLabel("Answer", { exact: true }).getByText("400", { exact: true }).waitFor();
  await made.getByLabel("Body", { exact: true }).fill('{"name": "tried"}');
  await made.getByRole("button", { name: "Send" }).click();
  await made.getByLabel("Answer", { exact: true }).getByText("201", { exact: true }).waitFor();
  await made.getByLabel("The answer's body").getByText('"name": "tried"').waitFor();
  say({ curl: await made.getByLabel("The request, for curl").innerText() });
  const followed = await tries(docs, "vm_events", { since: "0" });
  await followed.getByLabel("What has come so far").getByText("VM_FORKED").waitFor();
  await followed.getByRole("button", { name: "Stop" }).click();
  await accessible(docs, "the documentation");
  await docs.setViewportSize({ width: 360, height: 740 });
  await checked(docs, "the documentation at 360 px");
  await docs.setViewportSize({ width: 1280, height: 800 });
  await page.goto(`${base}/#/networks`);
  await shows(page, "networks", ["tried"]);

  // The first key closes the daemon for the page, too.
  const keys = await ask("keys");
  await page.getByLabel("API key").waitFor();
  await docs.reload();
  await docs.getByText("Sign in to read this").waitFor();
  await accessible(page, "signing in");
  await page.getByLabel("API key").fill("vlt_wrong");
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("alert").waitFor();
  await page.getByLabel("API key").fill(keys.viewer);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByText("key:watcher").waitFor();
  await docs.getByText("key:watcher, role viewer").waitFor();
  await (await tries(docs, "get_vm", { name: "again" })).getByLabel("The answer's body").getByText('"booted_from": "snapshot"').waitFor();
  await docs.goto(`${base}/docs#create_network`);
  await docs.getByText("which your role viewer does not have").waitFor();
  say({ sends: await docs.locator("#create_network").getByRole("button", { name: "Send" }).count() });
  await page.goto(`${base}/#/vms/again`);
  await page.locator(".head .state.running").waitFor();
  const may = await page.getByRole("button", { name: /Stop|Restart|Fork|Delete/ }).count() + await page.getByRole("link", { name: /Terminal|Files|Log/ }).count();
  await page.goto(`${base}/#/vms`);
  await page.getByRole("heading", { name: "VMs", exact: true }).waitFor();
  await page.locator(".top .state.live").waitFor();
  say({
    offered: may + await page.getByRole("link", { name: "Create VM" }).count() + await page.getByRole("link", { name: "Keys" }).count(),
    refused: await page.evaluate(() => fetch("api/v1/vms", {
      method: "POST", body: JSON.stringify({ name: "sneaky" }),
      headers: { "Content-Type": "application/json", "Volant-Session": localStorage.getItem("volant-session") },
    }).then((answer) => answer.status)),
    scripts: await page.evaluate(() => document.cookie),
    stored: JSON.stringify(await page.evaluate(() => ({ ...localStorage, ...sessionStorage }))).includes(keys.viewer),
  });
  await page.reload();
  await page.getByText("key:watcher").click();
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.getByText("You have signed out.").waitFor();
  await docs.getByText("Sign in to read this").waitFor();
  await checked(docs, "the documentation");
  await checked(page, "signing out");
}

/** Drives the browser in a VM by its pictures. */
async function driven(name, ...actions) {
  const page = await open();
  await page.goto(`${base}/#/vms/${name}/browser`);
  const screen = page.getByAltText("The page, live.");
  await screen.waitFor();
  const pad = `<title>pad</title><body onclick="t.focus()"><input id=t oninput="document.title='typed '+t.value"><img src=x onerror="document.title='<img src=x onerror=executed=1>'+document.title">`;
  await page.getByLabel("Address").fill(`data:text/html,${pad}`);
  await page.keyboard.press("Enter");
  await page.locator(".page-tab", { hasText: "<img src=x onerror=executed=1>pad" }).waitFor();
  await screen.click({ position: { x: 200, y: 150 } });
  await page.keyboard.type("by mouse and keys");
  await page.locator(".page-tab", { hasText: "typed by mouse and keys" }).waitFor();
  const pages = await page.locator(".page-tab").count();
  await page.getByLabel("New page").click();
  await page.locator(".page-tab").nth(pages).waitFor();
  await page.getByLabel(/^Close about:blank/).first().click();
  await page.waitForFunction((count) => document.querySelectorAll(".page-tab").length === count, pages);
  await accessible(page, "a browser");
  for (const action of actions) {
    await page.getByRole("link", { name: "Actions" }).click();
    await page.getByRole("button", { name: action }).click();
    await page.getByLabel("width").fill("320");
    await page.getByRole("button", { name: "Call", exact: true }).click();
    await page.waitForFunction(() => document.querySelector("img.answer")?.naturalWidth === 320);
  }
  await checked(page, "a browser");
}

/** Looks at 2,000 VMs that change, some of which were named by somebody hostile. */
async function many(newest, oldest, count) {
  const page = await open();
  await page.goto(base);
  await page.getByRole("link", { name: new RegExp(`\\b${count}\\b`) }).first().waitFor();
  const first = await page.evaluate(() => performance.now());
  const paint = await page.evaluate(() => performance.getEntriesByName("first-contentful-paint")[0].startTime);
  await page.goto(`${base}/#/vms`);
  const row = (name) => page.getByRole("link", { name, exact: true });
  await row(newest).waitFor();
  await ask("change");
  await page.evaluate(() => { longest = 0; });
  const body = page.locator(".list .body");
  for (let at = 1; at <= 20; at++) {
    await body.evaluate((element, part) => { element.scrollTop = part * element.scrollHeight; }, at / 20);
    await page.waitForTimeout(100);
  }
  await row(oldest).waitFor();
  const rows = await page.getByRole("row").count();
  await page.getByLabel("Search VMs").pressSequentially("vm19", { delay: 60 });
  await row("vm19").waitFor();
  await page.getByLabel("State").selectOption("crashed");
  await page.getByLabel("Search VMs").fill("");
  await row("vm7").waitFor();
  const changing = Math.round(await page.evaluate(() => longest));
  await accessible(page, "the list");
  await row("vm7").click();
  await page.locator(".note.bad", { hasText: "<script>executed=1</script>" }).waitFor();
  await checked(page, "a hostile VM");
  await page.setViewportSize({ width: 360, height: 740 });
  for (const view of ["overview", "vms", "vms/vm7", "create", "tree"]) {
    await page.goto(`${base}/#/${view}`);
    await page.waitForTimeout(200);
    await checked(page, `${view} at 360 px`);
  }
  await page.goto(`${base}/#/vms?state=crashed`);
  await accessible(page, "the list at 360 px");
  say({ paint: Math.round(paint), first: Math.round(first), changing, rows });
}

/** Signs in, out and in again; then a guest answers as the daemon would to a caller without a session. */
async function again(key) {
  const page = await open();
  await page.addInitScript(() => {
    const now = Date.now;
    window.later = 0;
    Date.now = () => now() + later;
    // What is looked at each five seconds is looked at each quarter of one.
    const every = setInterval;
    window.setInterval = (act, ms) => every(act, ms / 20);
    window.streams = [];
    const Source = EventSource;
    window.EventSource = function EventSource(url) { streams.push(new Source(url)); return streams.at(-1); };
  });
  await page.goto(base);
  const others = [];
  for (const round of [1, 2]) {
    await page.getByLabel("API key").fill(key);
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.locator(".top .state.live").waitFor();
    if (round === 2) break;
    // What one tab does with the session holds for the others.
    const other = await page.context().newPage();
    await other.goto(base);
    await other.locator(".top .state.live").waitFor();
    others.push(other);
    await page.getByRole("button", { name: /^key / }).click();
    await page.getByRole("button", { name: "Sign out" }).click();
    await page.getByText("You have signed out.").waitFor();
    await others[0].getByText("You have signed out.").waitFor();
  }
  await others[0].locator(".top .state.live").waitFor();
  await others[0].close();
  // The stream was silent for so long that it is opened again.
  const before = await page.evaluate(() => { later += 61_000; return streams.length; });
  await page.waitForFunction((count) => streams.length > count && streams.at(-1).readyState === 1, before);
  await page.waitForTimeout(1000);
  say({ open: await page.evaluate(() => streams.filter((one) => one.readyState !== 2).length) });

  await page.route("**/agent/**", (route) => route.fulfill({ status: 401, json: { type: "urn:volant:error:session-ended" } }));
  const status = await page.evaluate(async () => {
    const { client } = await import(document.querySelector("script[type=module]").src.replace("app.js", "store.js"));
    return client.get("api/v1/vms/guest/agent/v1/info").catch((error) => error.status);
  });
  await page.waitForTimeout(500);
  say({ status, signedIn: await page.getByRole("heading", { name: "Overview" }).count() });

  // It reports a time that no clock has, and a file that is longer than it says.
  const listed = Buffer.from("5 99999999999999999 81a4 odd\n").toString("base64");
  await page.route("**/vms/guest/inspect", (route) => route.fulfill({ json: { egress: null, actor: { actor: { process: { sandbox: {
    user: 0, capabilities: 8, no_new_privileges: false, filters: 0, limits: null } } } } } }));
  await page.route("**/agent/**", (route) => route.fulfill(route.request().method() === "POST"
    ? { body: `${JSON.stringify({ stream: "stdout", data: listed })}\n${JSON.stringify({ exit_code: 0 })}\n` } : { body: "x".repeat(1_000_000) }));
  await page.evaluate(async () => {
    const { vms } = await import(document.querySelector("script[type=module]").src.replace("app.js", "store.js"));
    vms.set(7, { id: 7, name: "guest", project: "default", plugin: "base", status: "running", labels: {}, pid: 4 });
    location.hash = "#/vms/guest";
  });
  await page.getByText("Capabilities").waitFor();
  say({ none: await page.locator(".panel.sandbox b, .panel.limits b").allInnerTexts() });
  await forms(page);
  await tables(page);
  await page.evaluate(() => { location.hash = "#/vms/guest/files"; });
  const [saved] = await Promise.all([page.waitForEvent("download"), page.getByRole("button", { name: "odd", exact: true }).click()]);
  say({ saved: saved.suggestedFilename().startsWith("odd"), edited: await page.locator("textarea").count() });
  await checked(page, "signing in again");
  await hosts(page);
}

/** Looks at tables that are empty in the walk, with what the API answers where they are not. */
async function tables(page) {
  const at = new Date(Date.now() - 5 * 86_400_000).toISOString();
  const rows = {
    images: { digest: `sha256:${"ab".repeat(32)}`, references: ["registry.example/web:1", "b"], platform: "linux/amd64", size_bytes: 3 * 2 ** 20, layers: [1, 2], used_at: at, used_by: ["VM web"] },
    templates: { digest: "cd".repeat(16), plugin: "base", state: "ready", cpu_cores: 2, memory_mb: 256, after: "agent", size_bytes: 2 ** 20, clones: 7, created_at: at },
    secrets: { name: "token", version: 3, readable: false, used_by: [], project: "default", updated_at: at },
    keys: { name: "ci", role: "operator", project: null, created_by: "key:root", expires_at: null, expired: false, last_used_at: at, last_used_from: "192.0.2.1", created_at: at },
  };
  await page.route("**/api/v1/images/pulls", (route) => route.fulfill({ json: [{ reference: "debian:13", phase: "layers", done_bytes: 1024, total_bytes: 2048 }] }));
  for (const [view, row] of Object.entries(rows)) {
    await page.route(new RegExp(`/api/v1/${view}(\\?|$)`), (route) => route.fulfill({ json: [row] }));
    await page.evaluate((place) => { location.hash = `#/${place}`; }, view);
    await page.getByRole("region", { name: view }).waitFor();
    if (view === "images") await shows(page, view, ["Fetching debian:13: layers, 1.0 KiB of 2.0 KiB"]);
    await whole(page, view);
    say({ [view]: await page.evaluate(() => [...document.querySelectorAll("table tr")].map((line) => [...line.cells].map((cell) => cell.innerText.trim()))) });
  }
}

/** Calls an action by the form that a hostile plugin's schema makes; a caller that may not use VMs has none. */
async function forms(page) {
  const properties = {
    url: { type: "string", minLength: 1, title: "<b onclick=executed=4>\u202e" }, count: { type: "integer", minimum: 1, default: 2 },
    kind: { enum: ["a", 1, "1", null], default: 1 }, flag: { type: "boolean", default: true }, maybe: { type: "boolean" }, note: { type: "string", default: 5 },
    tags: { type: "array", items: { type: "string" } }, ["__proto__"]: { type: "number" }, deep: { anyOf: 3 }, odd: true,
  };
  const actions = { other: { input: "none" }, draw: { description: "<img src=x onerror=executed=4>", input: { type: "object", required: ["url", "count", 5], properties } } };
  await page.route("**/api/v1/plugins/hostile/manifest", (route) => route.fulfill({ json: { actions } }));
  const sent = [];
  await page.route("**/vms/guest/actions/hostile/*", (route) => {
    sent.push(route.request().postDataJSON());
    return route.fulfill({ status: 422, headers: { "Content-Security-Policy": "sandbox" }, contentType: "text/html", body: "<script>executed=4</script>\u001b[2J refused" });
  });
  await page.evaluate(async () => {
    const { vms } = await import(document.querySelector("script[type=module]").src.replace("app.js", "store.js"));
    vms.set(7, { ...vms.get(7), plugin: "hostile" });
    location.hash = "#/vms/guest/actions?action=draw";
  });
  await page.getByLabel("(url)").fill("x y");
  await page.getByLabel("count").fill("3");
  await page.getByRole("button", { name: "Add to tags" }).click();
  await page.getByLabel("tags, item 1").fill("one");
  await page.getByLabel("__proto__").fill("0.5");
  await page.getByLabel("deep").fill("{");
  const call = page.getByRole("button", { name: "Call", exact: true });
  await call.click();
  await page.getByRole("alert").getByText("deep is not valid JSON").waitFor();
  await page.getByLabel("deep").fill("{\"a\": [1]}");
  await accessible(page, "a form");
  await call.click();
  await page.getByLabel("Answer", { exact: true }).getByText("<script>executed=4</script> refused").waitFor();
  await page.getByRole("button", { name: "other" }).click();
  await page.getByLabel("Input").fill("[5]");
  await call.click();
  await page.getByLabel("Answer", { exact: true }).getByText("422").waitFor();
  await checked(page, "a form");
  const offered = page.getByRole("link", { name: "Actions" });
  say({ sent, offered: [await offered.count(), await page.evaluate(async () => {
    const { session } = await import(document.querySelector("script[type=module]").src.replace("app.js", "store.js"));
    window.whole = session.value;
    session.value = { ...whole, permissions: ["view"] };
  }).then(() => page.getByRole("heading", { name: "Sandbox" }).waitFor()).then(() => offered.count())] });
  await page.evaluate(async () => {
    const { session } = await import(document.querySelector("script[type=module]").src.replace("app.js", "store.js"));
    session.value = whole;
  });
}

/** Signs in at an issuer, which is another site: as somebody with a role, as one without, and not at all. */
async function issuer(url) {
  const arrive = async () => {
    const page = await open({ beside: url });
    // The issuer's own pages have a font of another site.
    await page.route((address) => ![base, url].some((known) => address.href.startsWith(known)), (route) => route.abort());
    await page.goto(`${base}/#/vms`);
    await page.getByRole("button", { name: `Sign in with ${new URL(url).host}` }).click();
    await page.waitForURL(`${url}/**`);
    return page;
  };
  const sign = async (page, name) => {
    await page.locator("[name=login]").fill(name);
    await page.locator("[name=password]").fill("x");
    await page.locator("[type=submit]").click();
    await page.locator("[name=prompt][value=consent]").waitFor({ state: "attached" });
    await page.locator("[type=submit]").click();
  };
  const page = await arrive();
  await sign(page, "ops");
  await page.getByRole("button", { name: "oidc:ops" }).click();
  const cookies = await page.context().cookies(base);
  say({ at: page.url().replace(base, ""), role: await page.getByText("Role admin").count(), cookies: cookies.map(({ name, httpOnly, sameSite }) => [name, httpOnly, sameSite]),
    left: await page.evaluate(() => [sessionStorage.length, Object.keys(localStorage)]) });
  await checked(page, "after the sign-in");
  // Whoever is sent back in another tab is signed in there, too.
  const tab = await page.context().newPage();
  await tab.goto(`${base}/api/v1/session/oidc/callback?code=x&state=y`);
  await tab.getByRole("heading", { name: "Overview" }).waitFor();
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.getByText("You have signed out.").waitFor();

  const nobody = await arrive();
  await nobody.goBack();
  await nobody.getByLabel("API key").waitFor();
  say({ unfinished: await nobody.getByRole("alert").count() });
  await nobody.getByRole("button", { name: "Sign in with" }).click();
  await sign(nobody, "nobody");
  await nobody.getByRole("alert").getByText("none of this daemon's rules gives it a role").waitFor();
  await accessible(nobody, "the sign-in");
  await checked(nobody, "the sign-in");

  const denied = await arrive();
  await denied.getByRole("link", { name: "Cancel" }).click();
  await denied.getByRole("alert").getByText("denies the sign-in").waitFor();
  say({ stayed: await denied.evaluate(() => [location.pathname, sessionStorage.length, localStorage.length]) });
}

/** Looks at a fleet one of whose hosts drains, and another of which gives no sign of life. */
async function hosts(page) {
  const host = (name, more) => ({ name, state: "up", draining_since: null, cpu_cores: 4, memory_mb: 8192, zone: "", labels: {}, vms: 3, used_cpu_cores: 5,
    free_memory_mb: 2048, free_disk_mb: 4096, version: "1", ...more });
  const posted = [];
  const found = [host("h1"), host("h2", { state: "unreachable" }), host("h3", { draining_since: "2026-01-01T00:00:00Z", labels: { a: "<b>" } })];
  let gone = [];
  await page.route("**/api/v1/fleet", (route) => route.fulfill({ json: { host: "h1", unreachable: gone, etcd: "ok", trouble: "<i>trouble</i>", conflicts: [], fence: "closed" } }));
  await page.route(/\/api\/v1\/vms(\?|$)/, (route) => route.fulfill({ json: [{ id: 7, name: "guest", unreachable: gone[0] ?? null, updated_at: "2000-01-01T00:00:00Z" }] }));
  await page.route("**/api/v1/hosts/**", (route) => { posted.push(`${route.request().method()} ${new URL(route.request().url()).pathname}`); return route.fulfill({ json: {} }); });
  await page.route("**/api/v1/hosts", (route) => route.fulfill({ json: found }));
  const store = (act) => page.evaluate(`(async () => { const store = await import(document.querySelector("script[type=module]").src.replace("app.js", "store.js")); ${act} })()`);
  await store("store.host.value = 'h1'; store.vms.set(7, { ...store.vms.get(7), plugin: 'base', updated_at: '2026-01-01T00:00:00Z' }); location.hash = '#/vms/guest';");
  const actions = page.getByRole("button", { name: /Stop|Restart|Fork|Delete/ });
  await actions.first().waitFor();
  await store("store.vms.set(7, { ...store.vms.get(7), failover: 'restart', placement: { zone: 'r1', labels: { disk: 'nvme' }, affinity: {}, anti_affinity: { app: '<b>' } } }); store.revision.value++;");
  await shows(page, "a VM of a fleet", ["another host boots it again", "hosts of the zone r1", "hosts with disk=nvme", "where no VM has app=<b>"]);
  await page.evaluate(() => { location.hash = "#/create"; });
  await page.getByRole("textbox", { name: "Name", exact: false }).first().fill("placed");
  await page.getByText("More").click();
  await page.getByLabel("If its host fails").selectOption("restart");
  await page.getByLabel("Zone").fill("r1");
  await page.getByLabel("Only on hosts with labels").fill("disk=nvme");
  await page.getByLabel("Only where no VM has labels").fill("app=db");
  await accessible(page, "the form of a fleet");
  for (const way of ["volar", "curl", "Python"]) {
    await page.getByRole("button", { name: way }).click();
    say({ way: (await page.getByLabel(`The request, for ${way}`).innerText()).split(way === "volar" ? "placed" : way === "curl" ? " -d " : "CreateVm").at(-1) });
  }
  await page.getByLabel("If its host fails").selectOption("restore");
  await page.getByLabel("Replicate it every").fill("10m");
  say({ way: (await page.getByLabel("The request, for Python").innerText()).split("CreateVm").at(-1).split(", placement")[0] });
  await page.evaluate(() => { location.hash = "#/vms/guest"; });
  gone = ["h2"];
  await page.locator(".head .state.unreachable").waitFor();
  await page.getByText("Its host h2 gives no sign of life").waitFor();
  const left = [await actions.count(), await page.getByRole("link", { name: "Terminal" }).count()];
  await page.evaluate(() => { location.hash = "#/vms?state=unreachable"; });
  await page.getByRole("cell", { name: "unreachable" }).waitFor();
  gone = [];
  await page.getByText("No VM is like that").waitFor();
  gone = ["h2"];
  await page.getByRole("link", { name: "Hosts", exact: true }).click();
  const row = (name) => page.getByRole("row", { name: new RegExp(`^${name} `) });
  await row("h1").getByRole("button", { name: "Drain…" }).click();
  await page.getByText("No other host takes new VMs now").waitFor();
  await page.getByRole("dialog").getByRole("button", { name: "Drain" }).click();
  await page.getByRole("dialog").waitFor({ state: "detached" });
  await row("h3").locator(".state.draining").waitFor();
  await row("h3").getByRole("button", { name: "Undrain…" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Undrain" }).click();
  await page.getByRole("dialog").waitFor({ state: "detached" });
  await row("h2").getByRole("button", { name: "Delete…" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Cancel" }).click();
  await page.getByText("<i>trouble</i>").waitFor();
  await page.getByText("are paused until etcd answers").waitFor();
  await accessible(page, "the hosts");
  await page.setViewportSize({ width: 360, height: 740 });
  await checked(page, "the hosts at 360 px");
  await page.setViewportSize({ width: 1280, height: 800 });
  await store("window.whole = store.session.value; store.session.value = { ...whole, permissions: ['view', 'use', 'control'] };");
  await page.getByRole("button", { name: "Drain…" }).waitFor({ state: "detached" });
  say({ posted, left, steered: await page.getByRole("button", { name: /Drain|Delete/ }).count() });
  await store("store.session.value = whole; store.host.value = null; store.fleet.value = null;");
}

/** Tabs share one stream; those that have it are closed while events come. */
async function tabs() {
  const first = await open();
  const context = first.context();
  await context.addInitScript(() => {
    window.streams = [];
    window.lists = 0;
    window.ids = [];
    const Source = EventSource;
    window.EventSource = function EventSource(url) { streams.push(new Source(url)); return streams.at(-1); };
    const ask = fetch;
    window.fetch = (url, options) => { if (new URL(url).pathname.endsWith("/api/v1/vms")) lists++; return ask(url, options); };
  });
  let pages = [first, await context.newPage(), await context.newPage()];
  const join = async (page) => {
    await page.goto(`${base}/#/vms`);
    await page.locator(".top .state.live").waitFor();
    await page.evaluate(async () => {
      const store = await import(document.querySelector("script[type=module]").src.replace("app.js", "store.js"));
      store.onEvent((event) => ids.push(Number(event.id.split("-")[1])));
      window.states = () => [...store.vms.values()].map((vm) => `${vm.name} ${vm.status} ${vm.updated_at}`).sort().join("\n");
    });
  };
  for (const page of pages) await join(page);
  const opened = () => Promise.all(pages.map((page) => page.evaluate(() => streams.filter((one) => one.readyState === 1).length)));
  say({ streams: await opened(), lists: await Promise.all(pages.map((page) => page.evaluate(() => lists))) });
  await ask("change");
  const more = (page) => page.evaluate(() => new Promise((resolve) => {
    const wanted = ids.length + 20;
    const look = setInterval(() => { if (ids.length >= wanted) { clearInterval(look); resolve(); } }, 20);
  }));
  for (let round = 0; round < 2; round++) {
    await Promise.all(pages.map(more));
    const leader = (await opened()).indexOf(1);
    const [left] = pages.splice(leader, 1);
    await left.close();
    await Promise.all(pages.map(more));
  }
  // One that comes now has all that the others have.
  const late = await context.newPage();
  pages.push(late);
  await join(late);
  await more(late);
  const newest = await ask("stop");
  for (const page of pages) await page.waitForFunction((id) => ids.at(-1) === id, newest);
  const seen = await Promise.all(pages.map((page) => page.evaluate(() => ids)));
  const states = await Promise.all(pages.map((page) => page.evaluate(() => states())));
  say({ holes: seen.map((ids) => ids.filter((id, at) => at && id !== ids[at - 1] + 1).length), same: new Set(states).size,
    streams: (await opened()).toSorted(), lists: await Promise.all(pages.map((page) => page.evaluate(() => lists))) });

  // A tab that is not where the new leader begins takes over all that this has, and continues there.
  say({ heard: await late.evaluate(async () => {
    const { Tabs } = await import(document.querySelector("script[type=module]").src.replace("app.js", "tabs.js"));
    const heard = [];
    let wake = () => {};
    const hear = (what) => (said) => { heard.push([what, said]); wake(); };
    const page = (position) => ({ position: () => position, state: () => "all", replace: hear("replace"), take: hear("take"), status: () => {}, missed: hear("missed") });
    const until = async (what) => { while (heard.at(-1)?.[0] !== what) await new Promise((resolve) => { wake = resolve; }); };
    const [follower, leader] = [new Tabs("a test", page(3)), new Tabs("a test", page(5))];
    await leader.lead(async () => {
      leader.missed();
      leader.begin();
      leader.pass("one");
      await until("replace");
      leader.pass("two");
      await until("take");
    }, new AbortController().signal);
    follower.close();
    return heard.map((one) => one.filter(Boolean));
  }) });
}

/** Takes the pictures of the documentation: of an overview in light colours, and of forks in dark ones. */
async function pictures(light, dark) {
  for (const [colorScheme, view, file] of [["light", "overview", light], ["dark", "forks", dark]]) {
    const page = await open({ colorScheme, locale: "en-GB" });
    await page.goto(`${base}/#/${view}`);
    await page.locator(".top .state.live").waitFor();
    await ask(view);
    await page.waitForTimeout(view === "overview" ? 20_000 : 1000);
    await page.screenshot({ path: file });
  }
}

let code = 0;
try {
  await { walk, driven, many, again, tabs, pictures, issuer }[scenario](...rest);
} catch (error) {
  code = 1;
  const [page] = browser.contexts().flatMap((context) => context.pages());
  console.error(error.stack, page && (await page.locator("body").innerText().catch(() => "")).slice(0, 3000), problems.join("\n"));
}
say({ problems });
await browser.close();
process.exit(code);
