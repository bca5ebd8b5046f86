// Package telemetry is what a proxy tells the world of itself: log lines, the
// access log and metrics, under ztunnel's names and in its forms, so that
// dashboards and tools go on working.
//
//	out := telemetry.NewWriter(os.Stdout)
//	logs := telemetry.NewLogs(out, telemetry.LogOptions{JSON: true, Filter: "info"})
//	traffic := telemetry.NewTraffic(telemetry.TrafficConfig{Logs: logs})
//	pod.Recorder = traffic.Recorder()
//
// What runs on a reader (Recorder, and every logger's output) never blocks: a
// log line that finds the queue full is dropped and counted. Everything else
// may be called from any goroutine.
package telemetry
