// Where the data comes from: TensorBoard's server, or a report's own page.
//
// Both give `runs()`: {runs: [{name, info, problem, unpredicted: {quantity: sentence}, quantities: {quantity:
// [series]}, summary}], headlines: [[quantity]], bounds: {regimes, edges}, others, note} and `series(run)`:
// {quantities: {quantity: {series: [[step, value], ...]}}, verdicts: {quantity: verdict}, readings: {quantity:
// sentence}}. Both throw Errors whose message is a sentence. summary and bounds are as in answers.py.

/** Our plugin's routes; paths are relative to the page's base address. */
export class TensorBoardSource {
  live = true;

  async runs() {
    return this.#get("runs");
  }

  async series(run) {
    return this.#get(`series?run=${encodeURIComponent(run)}`);
  }

  async #get(path) {
    let response;
    try {
      response = await fetch(path);
    } catch {
      throw new Error("TensorBoard does not answer; is it still running?");
    }
    const body = await response.json().catch(() => ({}));
    if (!response.ok) throw new Error(body.error ?? `TensorBoard answered with status ${response.status}.`);
    return body;
  }
}

/** The JSON inside a report. */
export class EmbeddedSource {
  live = false;

  constructor(data) {
    this.data = data;
  }

  async runs() {
    return this.data;
  }

  async series(run) {
    return { quantities: this.data.series[run], verdicts: this.data.verdicts[run], readings: this.data.readings[run] };
  }
}
