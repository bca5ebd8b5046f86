package main

import (
	"runtime"
	"runtime/debug"

	"github.com/ztun/ztun/cmd/internal/config"
)

// release is set when a release is linked.
var release = "unknown"

// revision says which sources this was built from, and whether they were
// changed since.
func revision() (rev, status string) {
	rev, status = "unknown", "Clean"
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return rev, status
	}
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			rev = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			status = "Modified"
		}
	}
	return rev, status
}

func version() string {
	rev, status := revision()
	return "ztun-proxy " + release + " (" + rev + ", " + status + ", " + runtime.Version() + ")"
}

// versionDump is the config dump's version.
func versionDump(cfg *config.Config) map[string]string {
	rev, status := revision()
	istio := cfg.Node.Metadata["ISTIO_VERSION"]
	if istio == "" {
		istio = "unknown"
	}
	return map[string]string{
		"version": release, "gitRevision": rev, "goVersion": runtime.Version(), "buildProfile": "release",
		"buildStatus": status, "istioVersion": istio, "cryptoProvider": "go",
	}
}
