// What Python hands to the page. Written by scripts/page_types.py; not by hand.

/** The page of a run. */
export interface RunData {
  events: EventData;
  flow: FlowData;
  latents: LatentData | NoLatents;
  overview: OverviewData;
  curves: CurveData;
  rollouts: RolloutBrowserData;
}

/** A group without its tokens, as the page reads it. */
export interface GroupHead {
  step: number;
  id: string;
  question: string;
  answer: string;
  source: string;
  images: PictureData[];
  responses: ResponseHead[];
}

/**
 * Tokens of a response with their traces, as the page reads them: a value per token of each of
 * QUANTITIES that was recorded.
 */
export interface ResponseTokens {
  tokens: string[];
  flow_rewards?: (number | null)[];
  deviations?: (number | null)[];
  logprobs?: (number | null)[];
  advantages?: (number | null)[];
  entropy?: (number | null)[];
  attention?: AttentionData;
}

/** The tokens of one part of the run, as the page reads them. */
export interface TokenWindow {
  first: number;
  last: number;
  rewarded: TokenRow[];
  penalised: TokenRow[];
}

/** Responses as columns, as the page reads them. */
export interface LatentPoints {
  x: number[];
  y: number[];
  step: number[];
  verdict: number[];
  group: (number | null)[];
  response: number[];
  reward: (number | null)[];
  prediction: string[];
  question: number[];
  questions: string[];
}

/** The page of a comparison. */
export interface ComparisonData {
  name: string;
  writtenAt: string;
  runs: ComparedData[];
  groups: GroupData[];
  settings: Setting[];
  problems: FileNote[];
  numMoreProblems: number;
  curves: ComparedCurves;
}

/** A problem that one run solves and the other does not. */
export interface Flip {
  kind: "gained" | "lost";
  id: string;
  question: string;
  gold: string;
  a: FlipSide;
  b: FlipSide;
}

/** The page of an evaluation. */
export interface EvaluationData {
  name: string;
  model: string;
  writtenAt: string;
  benchmarks: BenchmarkData[];
  problems: FileNote[];
  numMoreProblems: number;
  numChunks: number;
}

/** A problem and its samples. */
export interface ProblemData {
  benchmark: number;
  id: string;
  question: string;
  golds: string[];
  source: string;
  images: PictureData[];
  chunk: number;
  at: number;
  samples: SampleData[];
}

/** The texts of a sample; what is empty is left out. */
export interface SampleTexts {
  response?: string[];
  left?: number;
  reply?: string;
  judge?: [string, string][];
}

/** What the monitors said, as the page reads it. */
export interface EventData {
  events: LoggedEvent[];
  numLeftOut: number;
  numRollBacks: number;
  numStepsTakenBack: number;
  watched: boolean;
}

/** The view of the flow without its tokens, as the page reads it. */
export interface FlowData {
  verdicts: Remark[];
  readings: Record<string, string>;
  missing: string;
  reference: number | null;
  yardstick: YardstickData | null;
  hasTokens: boolean;
  approximate: boolean;
}

/** The view of latents without its points, as the page reads it. */
export interface LatentData {
  explained: [number, number];
  numResponses: number;
  numPoints: number;
  verdicts: Remark[];
}

/** Why there are none. */
export interface NoLatents {
  missing: string;
}

/** With the benchmarks below the run's folder. */
export interface OverviewData {
  name: string;
  state: "empty" | "open" | "finished";
  status: string;
  writtenAt: string;
  lastMetricsAt: string | null;
  numSteps: number | null;
  plannedSteps: number | null;
  seconds: number | null;
  evaluations: Evaluation[];
  best: number | null;
  checkpoints: number[];
  latestCheckpoint: string;
  config: string;
  environment: Record<string, string>;
  problems: FileNote[];
  numMoreProblems: number;
  benchmarks: BenchmarkData[];
  benchmarkPage: string;
}

/** All curves of a run. */
export interface CurveData {
  metrics: Columns;
  flowFit: Columns;
  latents: Columns;
  evaluations: EvaluationPoint[];
}

/** What the rollout browser needs before it unpacks anything. */
export interface RolloutBrowserData {
  steps: number[];
  scales: Record<string, ColourRange>;
  numGroups: number;
  numResponses: number;
  numGroupsLeftOut: number;
  numStepsLeftOut: number;
  numAttention: number;
  numAttentionLeftOut: number;
}

/** What the page knows of a picture: where it carries it, or the file that it left out. */
export interface PictureData {
  path: string;
  key?: string | null;
  file?: string;
}

/** A response without its tokens, as the page reads it. */
export interface ResponseHead {
  index: number | null;
  text: string;
  prediction: string;
  verdict: string;
  reason: string;
  reward: number | null;
  parts: Record<string, number | null>;
  finish: string;
  version: number | null;
  numTokens: number;
  advantage: number | null;
  flowReward: number | null;
  numFlowTokens: number;
}

/** Where a response's tokens looked, as the page reads it. */
export interface AttentionData {
  grids: [number, number][];
  cells: string;
  share: number[];
}

/** One token in one window of steps. */
export interface TokenRow {
  token: string;
  reward: number;
  count: number;
  in_right: number | null;
  in_wrong: number | null;
  place: Occurrence;
}

/** A row of the table of runs. */
export interface ComparedData {
  name: string;
  method: string;
  seed: number | string | null;
  numSteps: number | null;
  plannedSteps: number | null;
  hours: number | null;
  best: PointData | null;
  last: PointData | null;
  numProblems: number | null;
  numSamples: number | null;
  versus: VersusData | null;
}

/** A run, or runs that differ in their seed alone, by number. */
export interface GroupData {
  runs: number[];
  last: PooledPoint | null;
}

/** A setting that is not the same in all runs. */
export interface Setting {
  key: string;
  values: string[];
  unknown: boolean;
}

/** Something a reader of the run should know about its files. */
export interface FileNote {
  kind: "missing" | "damaged" | "note";
  file: string;
  text: string;
}

/** All curves of the page. */
export interface ComparedCurves {
  every: number;
  runs: ComparedColumns[];
  groups: (PooledColumns | null)[];
}

/** A run's greedy response to a problem, and whether its samples are right. */
export interface FlipSide {
  text: string;
  prediction: string;
  verdict: string;
  finish_reason: string;
  samples: boolean[];
}

/** A benchmark's numbers and protocol. */
export interface BenchmarkData {
  name: string;
  title: string;
  folder: string;
  hash: string;
  protocol: [string, string][];
  summary: [string, string][];
  accuracy: Estimate | null;
  provisional: boolean;
  withheld: boolean;
  counts: Record<string, number>;
  truncated: number;
  meanLength: number | null;
  agreement: [number, number];
  numProblems: number;
  numSamples: number;
  passAt: [number, number | null] | null;
  majority: number | null;
  greedy: number | null;
  judge: string;
}

/** A response without its text; what is empty is left out. */
export interface SampleData {
  index: number;
  verdict: string;
  prediction?: string;
  reason?: string;
  rule?: string;
  finish?: string;
  promptTokens?: number;
  tokens?: number;
  seconds?: number;
  judge?: JudgeData;
}

/** One line of `events.jsonl`. */
export interface LoggedEvent {
  step: number;
  since: number | null;
  monitor: string;
  action: string;
  value: number | null;
  limit: number | null;
  what: string;
  cause: string;
  do: string;
  to: number | null;
}

/** One line about the flow. */
export interface Remark {
  level: "good" | "bad" | "plain" | "none";
  text: string;
}

/** A fit's figures, as the page reads them. */
export interface YardstickData {
  source: string;
  rows: HeldOut[];
  aucs: ProbedAuc[];
  num_responses: number | null;
  accuracy: number | null;
  names: string[];
}

/** One evaluation on the held-out problems. */
export interface Evaluation {
  step: number;
  accuracy: number | null;
  low: number | null;
  high: number | null;
  greedy: number | null;
  num_problems: number | null;
  num_samples: number | null;
  by_source: SourceAccuracy[];
}

/** A metrics file. */
export interface Columns {
  every: number;
  steps: number[];
  series: Record<string, (number | null)[]>;
}

/** An evaluation in the curve of accuracies. */
export interface EvaluationPoint {
  step: number;
  accuracy: number | null;
  low: number | null;
  high: number | null;
  greedy: number | null;
}

/** Range of a per-token quantity over the whole run, which fixes its colours. */
export interface ColourRange {
  kind: "signed" | "penalty" | "bonus" | "magnitude";
  low: number;
  high: number;
}

/** Where a token occurs: a response of the rollout files. */
export interface Occurrence {
  step: number;
  group: number;
  response: number;
  token: number;
  on_page: boolean;
}

/** One evaluation of a run. */
export interface PointData {
  step: number;
  accuracy: number | null;
  low: number | null;
  high: number | null;
  greedy: number | null;
}

/** A run against the first one. */
export interface VersusData {
  difference: Estimate | null;
  p: number | null;
  test: string;
  gained: number;
  lost: number;
  steps: [number, number] | null;
  words: string[];
}

/** Held-out accuracy over seeds. */
export interface PooledPoint {
  step: number;
  mean: number;
  low: number;
  high: number;
  num_runs: number;
}

/** Curves of a run. */
export interface ComparedColumns {
  steps: number[];
  hours: (number | null)[];
  series: Record<string, (number | null)[]>;
  evaluations: TimedPoint[];
}

/** Curves of pooled runs. */
export interface PooledColumns {
  series: Record<string, BandColumns>;
  evaluations: Record<string, BandColumns>;
}

/** A mean over problems with its 95 % interval. */
export interface Estimate {
  value: number;
  low: number;
  high: number;
  num_problems: number;
}

/** What a judge said of a response. */
export interface JudgeData {
  verdict: string;
  model: string;
  attempts: number | null;
  seconds: number | null;
}

/** Deviations on held-out tokens, by what predicted the velocity. */
export interface HeldOut {
  layer: number;
  at: string;
  values: Record<string, number>;
}

/** How often a wrong sibling has more of something than a right one. */
export interface ProbedAuc {
  name: string;
  auc: number;
  low: number | null;
  high: number | null;
  pairs: number | null;
}

/** Accuracy on the problems of one data source. */
export interface SourceAccuracy {
  name: string;
  accuracy: number | null;
  greedy: number | null;
  num_problems: number | null;
}

/** With the hours of training before it. */
export interface TimedPoint {
  step: number;
  accuracy: number | null;
  low: number | null;
  high: number | null;
  greedy: number | null;
  hours: number | null;
}

/** A curve of pooled runs. */
export interface BandColumns {
  steps: number[];
  hours: (number | null)[];
  mean: (number | null)[];
  low: (number | null)[];
  high: (number | null)[];
}
