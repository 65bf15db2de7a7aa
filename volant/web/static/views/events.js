/** Events of VMs, as lines of a timeline. */
import { Said, Time, clean, html, toVm } from "../ui.js";

const KINDS = {
  VM_CREATED: ["created", "pending"], VM_STARTING: ["starting", "starting"], VM_RUNNING: ["running", "running"],
  VM_PAUSED: ["paused", "paused"], VM_STOPPING: ["stopping", "stopping"], VM_STOPPED: ["stopped", "stopped"],
  VM_CRASHED: ["crashed", "crashed"], VM_DELETED: ["deleted", "stopped"], VM_FORKED: ["forked", "running"],
  VM_RESTORED: ["restored", "running"], VM_REPLICA_FAILED: ["not replicated", "crashed"], SNAPSHOT_TAKEN: ["snapshot", "paused"], SNAPSHOT_DELETED: ["snapshot deleted", "stopped"], WORKLOAD_STARTED: ["workload started", "running"],
  WORKLOAD_READY: ["workload ready", "running"], WORKLOAD_EXITED: ["workload exited", "stopped"],
  WORKLOAD_FAILED: ["workload failed", "crashed"],
};

export function EventLine({ event, vm = false }) {
  const [text, state] = KINDS[event.type] ?? [clean(event.type), ""];
  const said = event.reason ? `${event.reason.code}: ${event.reason.message}` : event.message;
  return html`<li><span class="quiet"><${Time} at=${event.timestamp}/></span><div class="what">
    ${vm && html`<a href=${toVm({ name: event.name, project: event.project ?? "default" })}>${event.name}</a>`}
    <span class="kind state ${state}">${text}</span>
    <span class=${event.reason ? "" : "quiet"}><${Said}>${said === text ? "" : said}<//></span>
    ${event.caller && html`<span class="quiet" title="Who asked for it">by <${Said}>${event.caller}<//></span>`}</div></li>`;
}
