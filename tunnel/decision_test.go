package tunnel_test

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/xds/securityapi"
)

// lines are a log's, as tests compare them: message, policy.
type lines struct {
	slog.Handler
	level slog.Level // From here on is enabled.
	got   []string
	asked int
}

func (l *lines) Enabled(_ context.Context, level slog.Level) bool {
	l.asked++
	return level >= l.level
}

func (l *lines) Handle(_ context.Context, r slog.Record) error {
	text := []string{r.Message}
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "policy" {
			text = append(text, a.Value.String())
		}
		return true
	})
	l.got = append(l.got, strings.Join(text, ": "))
	return nil
}

func (l *lines) take() []string {
	got := l.got
	l.got = nil
	return got
}

// TestPolicyDecisionsAreLogged: in the words of facts/ztunnel.md 7.2.
func TestPolicyDecisionsAreLogged(t *testing.T) {
	port := func(p uint32) *securityapi.Match { return &securityapi.Match{DestinationPorts: []uint32{p}} }
	for _, info := range []bool{false, true} {
		inWorld(t, func(w *world) {
			log := &lines{level: slog.LevelDebug}
			if info {
				log.level = slog.LevelInfo
			}
			w.edit = func(c *tunnel.Config) {
				c.PolicyLog, c.PolicyInfo = slog.New(slog.DiscardHandler), info
				if c.Workload.Name == "b" {
					c.PolicyLog = slog.New(log)
				}
			}
			a, b := pair(w)
			catch(b, 80)
			want := func(why string, text ...string) {
				t.Helper()
				synctest.Wait()
				if got := log.take(); !slices.Equal(got, text) {
					t.Errorf("%s: logged %q, want %q", why, got, text)
				}
			}
			put := func(p *securityapi.Authorization, dry bool) {
				p.DryRun = dry
				w.put(p)
				synctest.Wait()
			}
			c := a.call("10.0.0.2:80")
			want("no policy", "no allow policies, allow")
			put(policy("dry-allow", securityapi.Action_ALLOW, port(81)), true)
			want("a live connection, still allowed", "dry-run: no allow policies match")
			put(deny("dry-deny", 80), true)
			want("a live connection, still allowed", "dry-run: deny policy match: default/dry-deny", "dry-run: no allow policies match")
			a.call("10.0.0.2:80")
			want("dry runs", "dry-run: deny policy match: default/dry-deny", "dry-run: no allow policies match", "no allow policies, allow")
			a.call("10.0.0.2:81")
			want("another port", "dry-run: allow policy match: default/dry-allow", "no allow policies, allow")
			c.want("", "open")

			put(policy("allow", securityapi.Action_ALLOW, port(80)), false)
			log.take()
			a.call("10.0.0.2:80")
			want("allowed", "dry-run: deny policy match: default/dry-deny", "allow policy match: default/allow")
			a.call("10.0.0.2:82")
			want("not allowed", "no allow policies matched")
			put(deny("deny", 80), false)
			log.take()
			a.call("10.0.0.2:80")
			want("denied", "dry-run: deny policy match: default/dry-deny", "deny policy match: default/deny")
			c.want("", "reset")
			b.workload.AuthorizationPolicies = []string{"default/late"}
			w.put(b.workload)
			synctest.Wait()
			a.call("10.0.0.2:82")
			want("not delivered", "policy not delivered, deny: default/late")

			log.level, log.asked = slog.LevelError, 0
			a.call("10.0.0.2:82")
			want("switched off")
			if log.asked != 1 {
				t.Errorf("the log was asked %d times for a connection, want once", log.asked)
			}
		})
	}
}
