// The official conformance suite, all server scenarios of a protocol version; prints the checks of each scenario.
// Without a URL and a version: prints the names of the scenarios that belong to extensions of the protocol.
import { spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [url, version] = process.argv.slice(2);
const program = join(import.meta.dirname, "node_modules/@modelcontextprotocol/conformance/dist/index.js");
if (!url) {
  const listed = spawnSync(process.execPath, [program, "list", "--server"], { encoding: "utf8", timeout: 60_000 });
  for (const [, name] of listed.stdout.matchAll(/- (\S+) \[extension\]/g)) console.log(JSON.stringify(name));
  process.exit(listed.status);
}
const folder = mkdtempSync(join(tmpdir(), "mcp-suite-"));
try {
  const options = ["server", "--url", url, "--suite", "all", "--spec-version", version, "-o", folder];
  const ran = spawnSync(process.execPath, [program, ...options], { encoding: "utf8", timeout: 120_000 });
  if (!ran.stdout.includes("=== SUMMARY ===")) throw new Error(`the suite broke off:\n${ran.stdout}\n${ran.stderr}`);
  for (const entry of readdirSync(folder)) {
    const scenario = entry.replace(/^server-/, "").replace(/-\d{4}-\d\d-\d\dT[\d-]+Z$/, "");
    const checks = JSON.parse(readFileSync(join(folder, entry, "checks.json"), "utf8"));
    console.log(JSON.stringify({ scenario, checks: checks.map(({ id, status, errorMessage }) => ({ id, status, errorMessage })) }));
  }
} finally {
  rmSync(folder, { recursive: true, force: true });
}
