// @playwright/mcp, as it comes, driven by the official MCP client: ENDPOINT PAGE OUTPUT-DIRECTORY [KEY].
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import { seen, TEXT } from "./devtools_seen.mjs";

const [endpoint, page, directory, key] = process.argv.slice(2);
const server = path.join(path.dirname(createRequire(import.meta.url).resolve("@playwright/mcp/package.json")), "cli.js");
const client = new Client({ name: "conformance", version: "1" });
await client.connect(
  new StdioClientTransport({
    command: process.execPath,
    args: [server, "--cdp-endpoint", endpoint, ...(key ? ["--cdp-header", `X-Volant-API-Key: ${key}`] : []),
      "--output-dir", directory, "--image-responses", "omit", "--timeout-action", "300000",
      "--timeout-navigation", "120000", "--cdp-timeout", "120000"],
    cwd: directory,
    stderr: "inherit",
  }),
);
async function call(name, args) {
  const { content, isError } = await client.callTool({ name, arguments: args }, undefined, { timeout: 330_000 });
  const text = content.map((part) => part.text ?? "").join("\n");
  if (isError) throw new Error(`${name}: ${text}`);
  return text;
}
await call("browser_navigate", { url: page });
const told = await call("browser_evaluate", { function: `() => ${TEXT}` });
await call("browser_take_screenshot", { type: "png", fullPage: true, filename: "page.png" });
await call("browser_close", {});
await client.close();
const text = told.match(/"([^"\n]*)"/)?.[1];
seen("@playwright/mcp", text, await readFile(path.join(directory, "page.png")));
