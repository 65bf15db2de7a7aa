// A client made of the types that openapi-typescript writes: types.d.ts lies beside this when it runs.
import createClient from "openapi-fetch";
import type { components, paths } from "./types.d.ts";

const client = createClient<paths>({ baseUrl: process.argv[2] });
const params = { path: { name: "typescript" } };

// What has a default need not be given, or this does not compile.
const wanted: components["schemas"]["CreateVm"] = { name: "typescript" };
const made = await client.POST("/api/v1/vms", { params: { query: { wait: ["running"] } }, body: wanted });
if (made.error) throw new Error(JSON.stringify(made.error));
const listed = await client.GET("/api/v1/vms");
const got = await client.GET("/api/v1/vms/{name}", { params });
const file = await client.GET("/api/v1/vms/{name}/agent/v1/files/{path}", {
  params: { path: { name: "typescript", path: "etc/passwd" } },
  parseAs: "text",
});
const gone = await client.DELETE("/api/v1/vms/{name}", { params });
console.log(
  JSON.stringify({
    made: made.data.status,
    listed: listed.data?.map((vm) => vm.name),
    got: [got.data?.cpu_cores, got.data?.memory_mb],
    file: String(file.data).split(":")[0],
    gone: gone.response.status,
  }),
);
