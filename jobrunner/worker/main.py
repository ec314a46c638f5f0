"""A worker process from its start to its exit status; what the launcher calls."""

import asyncio
import gc
import logging
import signal

from jobrunner.errors import JobrunnerError
from jobrunner.worker.agent import Agent
from jobrunner.worker.config import AgentConfig
from jobrunner.worker.template import TemplateHandle

logger = logging.getLogger(__name__)


def run_worker_process(config: AgentConfig, template: TemplateHandle) -> int:
    """Run the agent until SIGTERM (or SIGINT, unless ignored); returns the exit status. The template ends with it.

    `template` is of `start_base_template`, called in this process or in the one it was forked from.
    """
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        try:
            return runner.run(_run(config, template))
        except JobrunnerError as error:
            logger.error("%s", error)
            return error.exit_status


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


async def _run(config: AgentConfig, template: TemplateHandle) -> int:
    agent = Agent(config, template)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, agent.stop)
    if config.ignore_interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        loop.add_signal_handler(signal.SIGINT, agent.stop)
    return await agent.run()
