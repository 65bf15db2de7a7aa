// What every MCP client does to Volant; what it saw is printed as one JSON value.
export async function drive(client, name, call, version) {
  const { tools } = await client.listTools();
  const progress = [];
  const created = await call("vms_create", { name, cpu_cores: 1, memory_mb: 128, timeout_s: 120 }, progress);
  const ran = await call("vms_exec", { vm: name, command: ["sh", "-c", "echo said >/dev/console; echo out; echo err >&2; exit 3"] });
  await call("vms_write_file", { vm: name, path: "/tmp/note", content: "grüße\n" });
  const read = await call("vms_read_file", { vm: name, path: "/tmp/note" });
  const long = await call("vms_exec", { vm: name, command: ["seq", "100000"] });
  const logs = await call("vms_logs", { vm: name, tail: 5 });
  const resource = await client.readResource({ uri: `volant://vms/${name}/logs` });
  const deleted = await call("vms_delete", { vm: name });
  const missing = await call("vms_get", { vm: name });
  console.log(
    JSON.stringify({
      version: version(),
      tools: tools.map((tool) => tool.name),
      progress,
      created: created.structuredContent,
      ran: ran.structuredContent,
      read: read.structuredContent,
      long: long.structuredContent,
      long_text: long.content[0].text,
      logs: logs.structuredContent,
      resource: resource.contents[0].text,
      deleted: deleted.structuredContent,
      missing,
    }),
  );
  await client.close();
}
