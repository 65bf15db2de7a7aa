// The TypeScript SDK of the new era against the URL of argv[2], with a VM named argv[3].
import { Client, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";
import { drive } from "./mcp_drive.mjs";

const client = new Client({ name: "volant-tests", version: "1" }, { versionNegotiation: { mode: "auto" } });
await client.connect(new StreamableHTTPClientTransport(new URL(process.argv[2])));
const call = (name, args, progress) =>
  client.callTool(
    { name, arguments: args },
    { timeout: 180_000, ...(progress && { onprogress: (told) => progress.push(told.message) }) },
  );
await drive(client, process.argv[3], call, () => client.getNegotiatedProtocolVersion());
