// Holds the AG-UI events in the file that is named, a JSON array, against AG-UI's own schemas and its verifier.
import { readFileSync } from "node:fs";
import { verifyEvents } from "@ag-ui/client";
import { EventSchema } from "@ag-ui/core/schemas";
import { from, lastValueFrom, toArray } from "rxjs";

const events = JSON.parse(readFileSync(process.argv[2], "utf8")).map((event) => EventSchema.parse(event));
const passed = await lastValueFrom(from(events).pipe(verifyEvents(false), toArray()));
console.log(JSON.stringify(passed.length));
