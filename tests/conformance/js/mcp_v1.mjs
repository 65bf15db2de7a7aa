// The TypeScript SDK of the old era against the URL of argv[2], with a VM named argv[3].
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import { drive } from "./mcp_drive.mjs";

const client = new Client({ name: "volant-tests", version: "1" });
const transport = new StreamableHTTPClientTransport(new URL(process.argv[2]));
await client.connect(transport);
const call = (name, args, progress) =>
  client.callTool({ name, arguments: args }, undefined, {
    timeout: 180_000,
    ...(progress && { onprogress: (told) => progress.push(told.message) }),
  });
await drive(client, process.argv[3], call, () => transport.protocolVersion);
