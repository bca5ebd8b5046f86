package admin

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"html/template"
	"net/http"
	"net/http/pprof"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/ztun/ztun/cmd/internal/telemetry"
)

// onceFlag says true once.
type onceFlag struct{ done atomic.Bool }

func (o *onceFlag) first() bool { return !o.done.Swap(true) }

// Config is what the admin server shows and what it may do.
type Config struct {
	Logs *telemetry.Logs
	// Dump returns what /config_dump shows.
	Dump func(context.Context) (any, error)
	// Quit begins a graceful shutdown. It does not wait.
	Quit func()
}

type page struct{ Path, Help string }

var pages = []page{
	{"debug/pprof/profile", "CPU profile of the next 10 seconds, for go tool pprof"},
	{"debug/pprof/heap", "heap profile, for go tool pprof"},
	{"quitquitquit", "shut down the server"},
	{"config_dump", "dump the current ztun-proxy configuration"},
	{"logging", "query/changing logging levels"},
}

var dashboard = template.Must(template.New("").Parse(`<!DOCTYPE html>
<html><head><title>ztun-proxy</title></head><body>
<h1>ztun-proxy</h1>
<table>{{range .}}<tr><td><a href="{{.Path}}">{{.Path}}</a></td><td>{{.Help}}</td></tr>
{{end}}</table></body></html>
`))

// Handler is the admin server on port 15000, which listens on localhost only.
func Handler(cfg Config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_ = dashboard.Execute(w, pages)
	})
	mux.HandleFunc("/config_dump", func(w http.ResponseWriter, r *http.Request) { configDump(w, r, cfg.Dump) })
	mux.HandleFunc("/logging", func(w http.ResponseWriter, r *http.Request) { logging(w, r, cfg.Logs) })
	mux.HandleFunc("/quitquitquit", func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		fmt.Fprint(w, "shutdown now\n")
		cfg.Quit()
	})
	mux.HandleFunc("/debug/pprof/profile", cpuProfile)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/{name}", func(w http.ResponseWriter, r *http.Request) {
		pprof.Handler(r.PathValue("name")).ServeHTTP(w, r)
	})
	return guarded(mux)
}

// guarded answers only those who named this machine: a web page that a user of
// the node looks at must not be able to reach the admin server under a name
// that it made point here.
func guarded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Sec-Fetch-Site") == "cross-site" || r.Method == http.MethodPost && r.Header.Get("Origin") != "" {
			http.Error(w, "not from another site", http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// cpuProfile takes seconds (1 to 300, by default 10), and frequency, which
// must make sense but changes nothing: Go's profiler has one of its own.
func cpuProfile(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	for _, p := range []struct {
		name     string
		fallback string
		max      int
	}{{"seconds", "10", 300}, {"frequency", "100", 1000}} {
		if !query.Has(p.name) {
			query.Set(p.name, p.fallback)
		}
		if n, err := strconv.Atoi(query.Get(p.name)); err != nil || n < 1 || n > p.max {
			http.Error(w, fmt.Sprintf("%s must be a number from 1 to %d", p.name, p.max), http.StatusBadRequest)
			return
		}
	}
	r = r.Clone(r.Context())
	r.URL.RawQuery = query.Encode()
	pprof.Profile(w, r)
}

func configDump(w http.ResponseWriter, r *http.Request, dump func(context.Context) (any, error)) {
	v, err := dump(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(bytes.TrimSuffix(b.Bytes(), []byte("\n")))
}

const loggingUsage = `usage: POST /logging	(To list current level)
usage: POST /logging?level=<level>	(To change global levels)
usage: POST /logging?level={mod1}={level1},{mod2}={level2}	(To change specific mods' logging level)
usage: POST /logging?reset	(To go back to the levels of the start)

hint: loglevel:	error|warn|info|debug|trace|off
`

func logging(w http.ResponseWriter, r *http.Request, logs *telemetry.Logs) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if r.Method != http.MethodPost {
		w.WriteHeader(http.StatusMethodNotAllowed)
		fmt.Fprint(w, loggingUsage)
		return
	}
	query := r.URL.Query()
	level, reset := query.Get("level"), query.Has("reset")
	if query.Has("level") && strings.TrimSpace(level) == "" && !reset {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, "Invalid level provided: %q\n%s", level, loggingUsage)
		return
	}
	if level != "" || reset {
		if err := logs.Change(level, reset); err != nil {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, "Invalid level provided: %v\n%s", err, loggingUsage)
			return
		}
	}
	fmt.Fprintf(w, "current log level is %v\n", logs.Filter())
}

// Metrics answers /metrics and /stats/prometheus on port 15020.
func Metrics(m *telemetry.Metrics) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/metrics" && r.URL.Path != "/stats/prometheus" {
			http.NotFound(w, r)
			return
		}
		var b bytes.Buffer
		if err := m.Encode(&b); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", telemetry.ContentType(strings.Join(r.Header.Values("Accept"), ",")))
		w.Header().Set("Vary", "Accept-Encoding")
		if !acceptsGzip(r.Header.Get("Accept-Encoding")) {
			_, _ = w.Write(b.Bytes())
			return
		}
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		_, _ = z.Write(b.Bytes())
		_ = z.Close()
	})
}

func acceptsGzip(header string) bool {
	for _, entry := range strings.Split(header, ",") {
		coding, params, _ := strings.Cut(entry, ";")
		if c := strings.TrimSpace(coding); strings.EqualFold(c, "gzip") || c == "*" {
			q := strings.ReplaceAll(params, " ", "")
			return !strings.HasPrefix(q, "q=0") || strings.Trim(q[3:], ".0") != ""
		}
	}
	return false
}
