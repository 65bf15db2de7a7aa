/** A request for a VM, as `volar`, curl and Python send it. */

const KEYS = ["image", "plugin", "cpu_cores", "memory_mb", "disk_mb", "network", "restart_policy", "ports", "volumes", "egress", "disk_iops", "disk_mbps", "kernel_cmdline", "boot", "failover", "replicate", "placement", "labels"];
/** What is there without being asked for. */
const USUAL = { restart_policy: "never", egress: "all", boot: "auto", failover: "never" };

/** Returns the body that would make a VM like this one. */
export function requestOf(vm) {
  const body = { name: vm.name };
  for (const key of KEYS) {
    const value = key === "image" ? vm.image?.reference : vm[key];
    const empty = value === null || value === undefined || value === "" || (Array.isArray(value) && !value.length)
      || (typeof value === "object" && !Object.keys(value).length);
    if (empty || value === USUAL[key] || (key === "plugin" && (value === "base" || vm.image))) continue;
    body[key] = value;
  }
  return body;
}

/** Returns the command that makes one more fork of what this VM is a fork of. */
export function forking(vm) {
  const words = ["volar", "vms", "fork", vm.origin.vm];
  if (vm.project !== "default") words.push("--project", vm.project);
  return wrap([...words, "--as", vm.name, "--wait"]);
}

/** Returns the command that calls an action of a VM's plugin. `body` undefined: without one. */
export function calling(vm, action, body) {
  const words = ["volar", "call", vm.name, action];
  if (vm.project !== "default") words.push("--project", vm.project);
  const members = body && typeof body === "object" && !Array.isArray(body) ? Object.entries(body) : null;
  // What `volar` would read in another way is sent as it is.
  if (members?.every(([name]) => /^[\w.]+$/.test(name))) {
    words.push(...members.map(([name, value]) => quoted(typeof value === "string" ? `${name}=${value}` : `${name}:=${JSON.stringify(value)}`)));
  } else if (body !== undefined) {
    words.push("--data", quoted(JSON.stringify(body)));
  }
  return words.join(" ");
}

/** A rule of the egress policy as `volar` takes it. */
export function written({ cidr, name, ports, protocol }) {
  return `${cidr ?? name}${ports?.length ? `:${ports.join(",")}` : ""}${protocol ? `/${protocol}` : ""}`;
}

const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${String(text).replaceAll("'", "'\\''")}'`);

/** Returns `[title, text]` for each of the three ways. `keyed`: a key is needed. */
export function shown(body, project = "default", keyed = false) {
  return [["volar", volar(body, project)], ["curl", curl(body, project, keyed)], ["Python", python(body, project, keyed)]];
}

function volar(body, project) {
  const words = ["volar", "vms", "create", body.name];
  const option = (name, value) => { if (value !== undefined && value !== null && value !== "") words.push(name, quoted(String(value))); };
  option("--project", project === "default" ? undefined : project);
  option("--image", body.image);
  option("--plugin", body.plugin);
  option("--from-snapshot", body.from_snapshot);
  option("--cpus", body.cpu_cores);
  option("--memory", body.memory_mb);
  option("--disk", body.disk_mb);
  option("--network", body.network);
  option("--restart-policy", body.restart_policy);
  option("--ttl", body.ttl);
  for (const rule of body.egress ? [body.egress].flat() : []) option("--egress", typeof rule === "string" ? rule : written(rule));
  option("--disk-iops", body.disk_iops);
  option("--disk-mbps", body.disk_mbps);
  option("--cmdline", body.kernel_cmdline);
  option("--boot", body.boot);
  option("--failover", body.failover);
  option("--replicate", body.replicate && `${body.replicate.every}${body.replicate.to > 1 ? `:${body.replicate.to}` : ""}`);
  option("--zone", body.placement?.zone);
  for (const [name, labels] of [["--host-label", body.placement?.labels], ["--affinity", body.placement?.affinity], ["--anti-affinity", body.placement?.anti_affinity]]) {
    for (const [key, text] of Object.entries(labels ?? {})) option(name, `${key}=${text}`);
  }
  for (const port of body.ports ?? []) option("--publish", port);
  for (const volume of body.volumes ?? []) option("--volume", volume);
  for (const [name, value] of Object.entries(body.labels ?? {})) option("--label", `${name}=${value}`);
  for (const [name, value] of Object.entries(body.env ?? {})) option("--env", `${name}=${value}`);
  words.push("--wait");
  if (body.command) words.push("--", ...body.command.map(quoted));
  return wrap(words);
}

/** Breaks a command before options, as people write it. */
function wrap(words) {
  const lines = [""];
  for (const word of words) {
    if (lines.at(-1).length + word.length > 76 && word.startsWith("-")) lines.push("   ");
    lines[lines.length - 1] += `${lines.at(-1).trim() || lines.length > 1 ? " " : ""}${word}`;
  }
  return lines.join(" \\\n");
}

function curl(body, project, keyed) {
  const headers = project === "default" ? [] : [["Volant-Project", project]];
  return curlOf({ method: "POST", url: `${location.origin}/api/v1/vms?wait=running`, headers, keyed, type: "application/json", body: JSON.stringify(body) });
}

/**
 * Returns the curl command of a request.
 * @param {{method: string, url: string, headers?: [string, string][], keyed: boolean, type?: string, body?: string, file?: boolean}} request
 *   `keyed`: a key is needed; `type`: that of the body; `file`: the body is a file
 */
export function curlOf({ method, url, headers = [], keyed, type, body, file = false }) {
  const sent = file || body !== undefined;
  const words = [`curl ${method === (sent ? "POST" : "GET") ? "" : `-X ${method} `}${quoted(url)}`, ...headers.map(([name, value]) => `-H ${quoted(`${name}: ${value}`)}`)];
  if (keyed) words.push('-H "X-Volant-API-Key: $VOLANT_API_KEY"');
  if (sent) words.push(`${type ? `-H ${quoted(`Content-Type: ${type}`)} ` : ""}${file ? "--data-binary @FILE" : `-d ${quoted(body)}`}`);
  return words.join(" \\\n  ");
}

function python(body, project, keyed) {
  const value = (of) => {
    if (Array.isArray(of)) return `[${of.map(value).join(", ")}]`;
    if (of && typeof of === "object") return `{${Object.entries(of).map(([key, one]) => `${JSON.stringify(key)}: ${value(one)}`).join(", ")}}`;
    return of === true ? "True" : of === false ? "False" : of === null ? "None" : JSON.stringify(of);
  };
  const typed = { placement: "Placement", replicate: "Replicate" };
  const membersOf = (of) => Object.entries(of).map(([key, one]) => `${key}=${typed[key] ? `${typed[key]}(${membersOf(one)})` : value(one)}`).join(", ");
  const members = membersOf(body);
  const more = `${keyed ? ", api_key=key" : ""}${project === "default" ? "" : `, project=${JSON.stringify(project)}`}`;
  return `async with Client(${JSON.stringify(location.origin)}${more}) as client:\n    await client.vms.create_and_wait(CreateVm(${members}))`;
}
