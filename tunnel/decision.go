package tunnel

import (
	"context"
	"log/slog"

	"github.com/ztun/ztun/xds/authz"
)

// decisions are the log messages of verdicts, which operators search for
// (facts/ztunnel.md 7.2; the last is ours). Those of dry runs are authz.DryRun's.
var decisions = map[authz.Reason]string{
	authz.DenyMatched:     "deny policy match",
	authz.NoAllowPolicies: "no allow policies, allow",
	authz.AllowMatched:    "allow policy match",
	authz.NoneAllowed:     "no allow policies matched",
	authz.NotDelivered:    "policy not delivered, deny",
}

// logDecision writes what the policies say of a connection: one line for each
// dry-run policy that matches, one for what decided. again: the connection was
// allowed before, and that it still is goes without saying.
func (p *Pod) logDecision(in *authz.Input, v *authz.Verdict, again bool) {
	level := slog.LevelDebug
	if p.cfg.PolicyInfo {
		level = slog.LevelInfo
	}
	ctx := context.Background()
	if !p.policyLog.Enabled(ctx, level) {
		return
	}
	write := func(message, policy string) {
		attrs := [3]slog.Attr{slog.Any("src.addr", in.Src), slog.Any("dst.addr", in.Dst), slog.String("policy", policy)}
		n := len(attrs)
		if policy == "" {
			n--
		}
		p.policyLog.LogAttrs(ctx, level, message, attrs[:n]...)
	}
	for _, d := range v.DryRun {
		write(d.String(), d.Policy)
	}
	if !v.Allowed || !again {
		write(decisions[v.Reason], v.Policy)
	}
}
